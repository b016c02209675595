#!/usr/bin/env bash
# Builds the TensorRT engines of this archive on the Jetson that it was packed for, proves them and measures them.
# Exit codes: 0 done, 1 the work failed, 2 the device is unfit or the archive damaged. What it knows is in manifest.json.
set -Eeuo pipefail
export LC_ALL=C

root="" dry_run=0 bench=1 ignore_memory=0 workspace=0 stage=start report=0

usage() {
    cat <<'TEXT'
Usage: bash build_on_device.sh [OPTIONS]

Checks the device and this archive, compiles the plugin library, builds one engine after the other, compares their
answers with ONNX Runtime's, measures decode and makes the bundle that ask.py asks. Run it again after an interruption:
what is finished is kept.

Options:
  --dry-run          Check the archive and the device, print the commands, build nothing.
  --no-bench         Leave the measurement out.
  --workspace MB     Largest workspace of the builder.  [default: TensorRT's own]
  --ignore-memory    Go on where the predicted memory does not fit, and try no large piece of it.
  --root DIR         For tests: read the system's files below DIR.
  --help             Show this text.

Results: engines/*.plan, work/libcm_plugins.so, bundle/, report.json and report.txt beside this script.

Examples:
  bash build_on_device.sh --dry-run
  bash build_on_device.sh
  bash build_on_device.sh --workspace 1024 --no-bench
TEXT
}

say() { printf 'build_on_device: %s\n' "$*" >&2; }
warn() { say "warning: $*"; if [[ $report == 1 ]]; then printf '%s\n' "$*" >>work/warnings.txt; fi; }

stop() { # CODE LINE: one line, the report, the end
    local code=$1
    shift
    trap - ERR
    say "error: $*"
    if [[ $report == 1 ]]; then
        printf '%s\n' "$*" >work/failure.txt
        python3 device/report.py failed || true
    fi
    exit "$code"
}
unfit() { stop 2 "$@"; }
failed() { stop 1 "$@"; }

on_error() { failed "$stage: line $1 ended with code $2; run it with 'bash -x' and report what it prints"; }
trap 'on_error "$LINENO" "$?"' ERR
trap 'say interrupted; exit 130' INT TERM

while (($#)); do
    case $1 in
    --help | -h) usage; exit 0 ;;
    --dry-run) dry_run=1 ;;
    --no-bench) bench=0 ;;
    --ignore-memory) ignore_memory=1 ;;
    --root | --workspace)
        if (($# < 2)); then unfit "$1: a value is missing; see --help"; fi
        if [[ $1 == --root ]]; then root=${2%/}; else workspace=$2; fi
        shift
        ;;
    *) unfit "$1: unknown option; see --help" ;;
    esac
    shift
done
if [[ ! $workspace =~ ^[0-9]+$ ]]; then unfit "--workspace: '$workspace' is not a number of MB; give one such as 1024"; fi

# Everything below names files relative to the archive: no path of the user's reaches trtexec, which splits at ':' and ','.
cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
for tool in python3 sha256sum df flock; do
    command -v "$tool" >/dev/null || unfit "$tool: not found; install it (sudo apt-get install python3 coreutils util-linux)"
done

# ---------------------------------------------------------------- the archive
stage="verify the archive"
say "$stage"
if [[ ! -f SHA256SUMS ]]; then unfit "SHA256SUMS: missing; unpack the archive again"; fi
if ! sums=$(sha256sum --check --strict --quiet SHA256SUMS 2>&1); then
    unfit "archive: ${sums%%$'\n'*}: copy the archive again and unpack it"
fi

declare -A fact=()
while IFS='=' read -r name value; do fact[$name]=$value; done < <(python3 device/facts.py system)
if [[ -z ${fact[target]:-} ]]; then unfit "manifest.json: unreadable; unpack the archive again"; fi
mapfile -t graphs < <(python3 device/facts.py graphs)

# ---------------------------------------------------------------- the device
stage="check the device"
say "$stage"
starts_with_any() { # VALUE A|B|C
    local value=$1 each
    local -a all
    IFS='|' read -ra all <<<"$2"
    for each in "${all[@]}"; do if [[ $value == "$each"* ]]; then return 0; fi; done
    return 1
}
installed() { dpkg-query --show --showformat='${Version}' "$1" 2>/dev/null || true; } # PACKAGE -> its version or nothing
gigabytes() { awk -v bytes="$1" 'BEGIN { printf "%.1f GB", bytes / 1e9 }'; }

model=""
if [[ -r $root/proc/device-tree/model ]]; then model=$(tr -d '\0' <"$root/proc/device-tree/model"); fi
if [[ -z $model ]]; then unfit "device: no $root/proc/device-tree/model, so this is no Jetson; run it on a ${fact[title]}"; fi
if [[ ! $model =~ ${fact[model]} ]]; then
    unfit "device: this is '$model', the archive is for ${fact[title]}; pack again with another --target"
fi

l4t=""
if [[ -r $root/etc/nv_tegra_release ]]; then
    line=$(head -n 1 "$root/etc/nv_tegra_release")
    if [[ $line =~ R([0-9]+)\ \(release\),\ REVISION:\ ([0-9.]+) ]]; then l4t="${BASH_REMATCH[1]}.${BASH_REMATCH[2]}"; fi
fi
if [[ -z $l4t ]]; then l4t=$(installed nvidia-l4t-core); fi
jetpack=$(installed nvidia-jetpack)
if [[ -z $l4t ]]; then unfit "JetPack: neither /etc/nv_tegra_release nor nvidia-l4t-core says which; install JetPack ${fact[jetpack]}"; fi
if ! starts_with_any "$l4t" "${fact[l4t]}"; then
    unfit "JetPack: Jetson Linux $l4t${jetpack:+ (JetPack $jetpack)} is installed, the archive is for JetPack ${fact[jetpack]} (${fact[l4t]//|/, }); pack again with another --jetpack, or install that one"
fi

headers=""
for folder in "$root/usr/include/aarch64-linux-gnu" "$root/usr/include" "$root/usr/local/tensorrt/include"; do
    if [[ -z $headers && -r $folder/NvInferVersion.h ]]; then headers=$folder; fi
done
if [[ -z $headers ]]; then unfit "TensorRT: no NvInferVersion.h; install its headers (sudo apt-get install libnvinfer-headers-dev)"; fi
tensorrt=$(installed libnvinfer-bin)
if [[ -z $tensorrt ]]; then tensorrt=$(python3 device/facts.py headers "$headers/NvInferVersion.h"); fi
if [[ $tensorrt != "${fact[tensorrt]}".* ]]; then
    unfit "TensorRT: ${tensorrt:-no version} is installed, the graphs are for ${fact[tensorrt]}; pack again with the --jetpack of this device"
fi

nvcc=$(command -v nvcc || true)
if [[ -z $nvcc && -x $root/usr/local/cuda/bin/nvcc ]]; then nvcc=$root/usr/local/cuda/bin/nvcc; fi
if [[ ${fact[plugins]} == 1 ]]; then
    if [[ -z $nvcc ]]; then unfit "CUDA: no nvcc, which compiles the plugin library; install it (sudo apt-get install nvidia-jetpack) or put it on PATH"; fi
    if ! command -v cmake >/dev/null; then unfit "cmake: not found, it builds the plugin library; install it (sudo apt-get install cmake)"; fi
fi
cuda=""
if [[ -n $nvcc ]]; then
    words=$("$nvcc" --version)
    if [[ $words =~ release\ ([0-9]+\.[0-9]+) ]]; then cuda=${BASH_REMATCH[1]}; fi
fi
if [[ -z $cuda && -r $root/usr/local/cuda/version.json ]]; then cuda=$(python3 device/facts.py cuda "$root/usr/local/cuda/version.json"); fi
if [[ ${cuda%%.*} != "${fact[cuda]%%.*}" ]]; then
    unfit "CUDA: ${cuda:-no version} is installed, JetPack ${fact[jetpack]} has ${fact[cuda]}; install JetPack's own CUDA"
fi

trtexec=$(command -v trtexec || true)
if [[ -z $trtexec && -x $root/usr/src/tensorrt/bin/trtexec ]]; then trtexec=$root/usr/src/tensorrt/bin/trtexec; fi
if [[ -z $trtexec ]]; then unfit "trtexec: not found; install it (sudo apt-get install libnvinfer-bin)"; fi
help=$("$trtexec" --help 2>&1 || true)
while read -r flag; do
    if [[ $help != *"$flag"* ]]; then unfit "trtexec: $trtexec does not know $flag; use the trtexec of TensorRT ${fact[tensorrt]}"; fi
done < <(python3 device/facts.py flags)

mode=""
if command -v nvpmodel >/dev/null; then
    words=$(nvpmodel -q 2>/dev/null || true)
    if [[ $words =~ NV\ Power\ Mode:\ *([A-Za-z0-9_]+) ]]; then mode=${BASH_REMATCH[1]}; fi
fi

declare -A memory=()
while IFS='=' read -r name value; do memory[$name]=$value; done < <(python3 device/facts.py memory "$root/proc/meminfo")
available=${memory[available]:-0} swap=${memory[swap]:-0}
disk=$(($(df -Pk . | awk 'NR == 2 { print $4 }') * 1024))

advice="close the desktop (sudo systemctl isolate multi-user.target), or pack with a smaller --capacity"
if [[ ${fact[precision]} != int4 ]]; then advice+=" or --precision int4"; fi
if [[ $ignore_memory == 0 ]]; then
    if ((fact[run_bytes] > available)); then
        unfit "memory: running needs about $(gigabytes "${fact[run_bytes]}"), $(gigabytes "$available") are available; $advice"
    fi
    missing=0
    for graph in "${graphs[@]}"; do if [[ ! -f engines/$graph.plan ]]; then missing=1; fi; done
    if ((missing && fact[build_bytes] > available + swap)); then
        unfit "memory: building needs about $(gigabytes "${fact[build_bytes]}"), $(gigabytes "$available") and $(gigabytes "$swap") of swap are available; add swap, $advice"
    fi
fi
# Free memory is not always given in one piece: docs/jetson.md has what is known. CMA is believed not to limit one, since the
# GPU sees memory through page tables; its size goes into the report.
untried=""
if [[ $ignore_memory == 0 ]]; then
    code=0
    told=$(python3 device/largest.py "${fact[largest_bytes]}" "$root" 2>&1) || code=$?
    piece="one piece of $(gigabytes "${fact[largest_bytes]}"), for ${fact[largest_what]}"
    if ((code == 3)); then
        untried="memory: there is no libcudart.so, so $piece was not tried"
    elif ((code)); then
        old=""
        if [[ $l4t == 36.4.7* ]]; then old="Jetson Linux 36.4.7 is reported to refuse large pieces: update to 36.5 or later; or "; fi
        unfit "memory: CUDA does not give $piece: ${told##*$'\n'}; ${old}free the page cache (sudo sysctl -w vm.drop_caches=3), restart the device, or $advice"
    fi
fi
if ((fact[disk_bytes] > disk)); then
    unfit "disk: the engines need about $(gigabytes "${fact[disk_bytes]}"), $(gigabytes "$disk") are free here; free some"
fi

# ---------------------------------------------------------------- ready
if [[ $dry_run == 0 ]]; then
    mkdir -p work engines
    exec 9>work/lock # held by every child, too: a builder that outlives this script still counts
    if ! flock --nonblock 9; then unfit "work/lock: another run is at work in this folder; wait for it"; fi
    rm -f work/*.tmp engines/*.tmp work/*.parity.json work/*.bench.log work/failure.txt work/warnings.txt work/asking.txt report.json report.txt
    report=1
    python3 device/facts.py device "model=$model" "l4t=$l4t" "jetpack=$jetpack" "tensorrt=$tensorrt" "cuda=$cuda" \
        "power_mode=$mode" "available_bytes=$available" "free_bytes=${memory[free]:-0}" "swap_bytes=$swap" \
        "cma_bytes=${memory[cma]:-0}" "cma_free_bytes=${memory[cma_free]:-0}" "disk_bytes=$disk" >work/device.json
fi
if [[ -n $mode ]] && ! [[ "|${fact[fastest]}|" == *"|$mode|"* ]]; then
    warn "power mode $mode is not the fastest; for the figures that the device can reach: sudo nvpmodel -m 0 && sudo jetson_clocks"
fi
if [[ $cuda != "${fact[cuda]}" ]]; then warn "CUDA $cuda is installed, JetPack ${fact[jetpack]} came with ${fact[cuda]}"; fi

if [[ -n $untried ]]; then warn "$untried"; fi
asking=$(python3 device/packages.py)
if [[ -n $asking ]]; then say "ask.py will not answer yet: $asking"; fi

kept() { # FILE KEY: whether it was made with that key and is as it was then
    [[ -f $1 && -f $1.key && $(<"$1.key") == "$2 $(sha256sum <"$1")" ]]
}
keep() { # FILE KEY: it is finished
    printf '%s %s\n' "$2" "$(sha256sum <"$1")" >"$1.key"
}
run() { # LOG COMMAND..: the command with its output in the log, or only shown
    local log=$1
    shift
    if [[ $dry_run == 1 ]]; then
        printf '%q ' "$@"
        printf '\n'
        return 0
    fi
    local code=0
    "$@" >"$log" 2>&1 </dev/null || code=$?
    return "$code"
}
why() { # CODE LOG: the reason in a few words
    if (($1 == 137)); then
        printf 'killed, most likely for lack of memory; add swap and run it again'
    else
        printf '%s (all of it: %s)' "$(python3 device/facts.py why "$2")" "$2"
    fi
}
attempt() { # NAME LOG COMMAND..: or the one line and the end
    local name=$1 log=$2 code=0
    shift 2
    run "$log" "$@" || code=$?
    if ((code)); then failed "$name: $(why "$code" "$log")"; fi
}

# ---------------------------------------------------------------- the plugin library
library=""
if [[ ${fact[plugins]} == 1 ]]; then
    stage="compile the plugin library"
    library=work/libcm_plugins.so
    key=$(python3 device/facts.py plugin-key "$tensorrt" "$cuda")
    if kept "$library" "$key"; then
        say "$stage: there already"
    else
        say "$stage"
        if [[ $dry_run == 0 ]]; then rm -rf work/build "$library" "$library.key"; fi
        attempt "plugin library" work/plugins.log cmake -S plugins -B work/build -DCMAKE_BUILD_TYPE=Release \
            "-DCMAKE_CUDA_ARCHITECTURES=${fact[sm]}" "-DCMAKE_CUDA_COMPILER=$nvcc" "-DCM_TENSORRT_INCLUDE=$headers"
        attempt "plugin library" work/plugins.log cmake --build work/build --parallel 2
        if [[ $dry_run == 0 ]]; then
            built=$(find work/build -name libcm_plugins.so -type f -print -quit)
            if [[ -z $built ]]; then failed "plugin library: cmake built no libcm_plugins.so; see work/plugins.log"; fi
            cp "$built" "$library.tmp"
            mv "$library.tmp" "$library"
            keep "$library" "$key"
        fi
    fi
fi

# ---------------------------------------------------------------- the engines
# cm-export of the same version, with TensorRT's Python module, checks the network as well; trtexec is always there.
builder=trtexec
if python3 -c 'import sys, tensorrt, cm_export; sys.exit(cm_export.__version__ != sys.argv[1])' "${fact[tool]}" >/dev/null 2>&1; then
    builder=cm-export
fi
for graph in "${graphs[@]}"; do
    stage="build $graph"
    engine=engines/$graph.plan
    mapfile -t words < <(python3 device/facts.py build "$graph")
    if ((${#words[@]} == 0)); then failed "manifest.json: no flags for $graph; unpack the archive again"; fi
    if ((workspace)); then words+=("--memPoolSize=workspace:$workspace"); fi
    key=$(python3 device/facts.py key "$graph" "$library" "$tensorrt" "$builder" "${words[@]}")
    if kept "$engine" "$key"; then
        say "$stage: there already"
        continue
    fi
    say "$stage with $builder (log: work/$graph.build.log)"
    started=$SECONDS
    if [[ $dry_run == 0 ]]; then rm -f "$engine" "$engine.key" "work/$graph.layers.json"; fi
    if [[ $builder == cm-export ]]; then
        if [[ $dry_run == 0 ]]; then python3 device/facts.py job "$graph" "$library" "$engine.tmp" "$workspace" >"work/$graph.job.json"; fi
        attempt "engine $graph" "work/$graph.build.log" python3 device/with_cm_export.py "work/$graph.job.json"
    else
        if [[ -n $library ]]; then words+=("--dynamicPlugins=$library"); fi
        attempt "engine $graph" "work/$graph.build.log" "$trtexec" "--onnx=onnx/$graph.onnx" "--saveEngine=$engine.tmp" "${words[@]}"
    fi
    if [[ $dry_run == 0 ]]; then
        if [[ ! -s $engine.tmp ]]; then failed "engine $graph: $builder wrote no engine; see work/$graph.build.log"; fi
        mv "$engine.tmp" "$engine"
        keep "$engine" "$key"
        printf '{"seconds": %d, "builder": "%s"}\n' "$((SECONDS - started))" "$builder" >"work/$graph.build.json"
    fi
done

# ---------------------------------------------------------------- what is in them
plugins=()
if [[ -n $library ]]; then plugins+=("--dynamicPlugins=$library"); fi
for graph in "${graphs[@]}"; do
    stage="inspect $graph"
    # trtexec can end well although the engine did not load: what counts is what it wrote.
    if [[ $dry_run == 0 ]]; then rm -f "work/$graph.layers.json"; fi
    attempt "engine $graph" "work/$graph.inspect.log" "$trtexec" "--loadEngine=engines/$graph.plan" "${plugins[@]}" \
        --dumpLayerInfo --profilingVerbosity=detailed --skipInference "--exportLayerInfo=work/$graph.layers.json"
    if [[ $dry_run == 0 ]]; then
        if ! line=$(python3 device/check_layers.py "$graph" "work/$graph.layers.json" 2>&1); then failed "engine $graph: ${line##*$'\n'}"; fi
    fi
done

# ---------------------------------------------------------------- what they answer, and how fast
probe() { # NAME LOG WORDS..: run a probe's inputs through its engine
    local name=$1 log=$2
    local -a given
    shift 2
    mapfile -t given < <(python3 device/facts.py probe "$name")
    if ((${#given[@]} == 0)); then failed "manifest.json: no probe $name; unpack the archive again"; fi
    attempt "$stage" "$log" "$trtexec" "${given[@]}" "${plugins[@]}" "$@"
}
mapfile -t once < <(python3 device/facts.py once)
mapfile -t benching < <(python3 device/facts.py benching)
while read -r name; do
    stage="parity of $name"
    say "$stage"
    if [[ $dry_run == 0 ]]; then rm -f "work/$name.output.json" "work/$name.parity.json"; fi
    probe "$name" "work/$name.parity.log" "${once[@]}" "--exportOutput=work/$name.output.json"
    if [[ $dry_run == 0 ]]; then
        if ! line=$(python3 device/compare.py "$name" "work/$name.output.json" "work/$name.parity.json" 2>&1); then failed "${line##*$'\n'}"; fi
        rm -f "work/$name.output.json" # numbers as text: large
    fi
done < <(python3 device/facts.py probes)
if [[ $bench == 1 ]]; then
    while read -r name; do
        stage="measure $name"
        say "$stage"
        probe "$name" "work/$name.bench.log" "${benching[@]}"
        if [[ $dry_run == 0 ]] && ! grep -q "GPU Compute Time: min" "work/$name.bench.log"; then
            failed "$stage: trtexec printed no times; see work/$name.bench.log"
        fi
    done < <(python3 device/facts.py benched)
fi

# ---------------------------------------------------------------- what ask.py asks
stage="make the bundle"
if [[ -n $asking ]]; then
    if [[ $dry_run == 0 ]]; then printf '%s; then bash build_on_device.sh --no-bench\n' "$asking" >work/asking.txt; fi
else
    say "$stage"
    attempt "bundle" work/bundle.log env "PYTHONPATH=host${PYTHONPATH:+:$PYTHONPATH}" python3 -m cm_export.deploy.jetson.assemble . "$tensorrt"
fi

stage="write the report"
if [[ $dry_run == 1 ]]; then
    say "dry run: the device is fit, nothing was built"
else
    python3 device/report.py passed
    cat report.txt
fi
