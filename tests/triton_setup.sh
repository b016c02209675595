#!/usr/bin/env bash
# triton_setup.sh FOLDER REQUIREMENTS: a real Triton server for the tests, without a GPU or containers: FOLDER/bin/tritonserver.
# REQUIREMENTS: what `vlm` imports, as `cm-export deploy triton` writes it. Needs python3.11 (PYTHON=) and pip's index.
set -euo pipefail
folder=$1 requirements=$(realpath "$2") here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$folder/bin"
folder=$(cd "$folder" && pwd)
"${PYTHON:-python3}" -m venv "$folder/venv"
pip="$folder/venv/bin/pip --quiet --disable-pip-version-check install"
# Its Python backend is older than numpy 2, which the requirements pin for newer servers.
grep -v '^numpy\|^ml-dtypes' "$requirements" > "$folder/requirements.txt"
$pip --requirement "$folder/requirements.txt" 'numpy<2' 'ml-dtypes<0.6' 'tritonclient[grpc]==2.69.0'
$pip --no-deps nvidia-pytriton==0.7.0 # a server 2.51 with the Python backend; what its own package needs is not used
site=$("$folder/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
version=$("$folder/venv/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
library=$("$folder/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_config_var("LIBDIR"))')
mkdir -p "$folder/backends"
cp -r "$site/pytriton/tritonserver/backends/python" "$folder/backends/"
cp "$site/pytriton/tritonserver/python_backend_stubs/$version/triton_python_backend_stub" "$folder/backends/python/"
for name in onnxruntime tensorrt; do # whatever loads `backend: "onnxruntime"` and `platform: "tensorrt_plan"` on a machine without them
  mkdir -p "$folder/backends/$name"
  cp "$here/triton_stand_in.py" "$folder/backends/$name/model.py"
done
cat > "$folder/bin/tritonserver" <<END
#!/bin/sh
# The embedded interpreter finds packages through PATH, not PYTHONPATH.
export PATH="$folder/venv/bin:\$PATH" LD_LIBRARY_PATH="$site/nvidia_pytriton.libs:$library"
exec "$site/pytriton/tritonserver/bin/tritonserver" --backend-directory="$folder/backends" "\$@"
END
chmod +x "$folder/bin/tritonserver"
