"""The trials of a search, in a storage that many processes and machines may share; a killed process's trials are run again.

WAITING -> RUNNING -> COMPLETE      told: share of dense kept, cost beside dense
              |-----> FAIL          its process died: the same parameters wait again
              |-----> FAIL, "error" the recipe cannot be run here: counted, not tried again

A result is recorded once: if another process has given a trial up for dead, its late result is dropped.
"""

import hashlib
import json
import os
import socket
import sqlite3
import time
import warnings
from pathlib import Path
from typing import Any

import psutil

from ..base.errors import InputError
from ..base.install import pip_install
from ..base.paths import expanded

try:
    import optuna
    from optuna.trial import FrozenTrial, TrialState
except ImportError as e:
    raise InputError("the package optuna is not installed", where="tune", fix=pip_install("tune")) from e

optuna.logging.set_verbosity(optuna.logging.CRITICAL)
SILENCE = 900  # seconds without a sign of life after which a trial of another machine counts as dead
_NAMELESS = 60  # the same for a trial that has not yet recorded which process runs it
RETRIES = 2  # how often a trial is run again after its process died
_SQLITE = (".db", ".sqlite", ".sqlite3")
_STARTUP = 12  # random trials, counting the given first ones, before TPE's model is used


class Sampler(optuna.samplers.BaseSampler):
    """TPE that is seeded with the trial's number: after an interruption it draws what it would have drawn."""

    _inner: optuna.samplers.TPESampler  # of the trial at hand: `before_trial` is what Optuna calls first

    def __init__(self, seed: int, floor: float):
        self.seed, self.floor = seed, floor

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        digest = hashlib.sha256(f"{self.seed} {trial.number}".encode()).digest()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `group` is called experimental since 2020
            self._inner = optuna.samplers.TPESampler(
                n_startup_trials=_STARTUP,
                multivariate=True,
                group=True,
                constant_liar=True,  # other processes are at work on trials of their own
                seed=int.from_bytes(digest[:4], "big"),
                constraints_func=lambda t: (self.floor - t.user_attrs["facts"]["of_dense"],),
            )
        self._inner.before_trial(study, trial)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, Any]:
        return self._inner.infer_relative_search_space(study, trial)

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, Any]) -> dict[str, Any]:
        return self._inner.sample_relative(study, trial, search_space)

    def sample_independent(self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: Any):
        return self._inner.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Any) -> None:
        if state == TrialState.COMPLETE:
            self._inner.after_trial(study, trial, state, values)


def open_study(place: str, name: str, settings: dict[str, Any], seed: int, floor: float) -> tuple[optuna.Study, bool]:
    """The study of these settings in a file or a database, and whether it is new. Raises InputError for other settings."""
    try:
        study = _created(place, name, Sampler(seed, floor))
        found = study.user_attrs.get("settings")
        trials = study.get_trials(deepcopy=False)
    except InputError:
        raise
    except Exception as e:  # a database can refuse in many ways; all of them are for the user to solve
        why = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise InputError(f"cannot be opened ({shown(why, place)})", where=shown(place), fix="check --study") from e
    if found is None and trials:
        raise InputError(
            f"holds a study {name!r} that is not of cm-export", where=shown(place), fix="give another --study"
        )
    for key, value in settings.items():
        if found is not None and found.get(key) != value:
            what = f"holds another search: its {key} is {_short(found.get(key))}, here it is {_short(value)}"
            raise InputError(what, where=shown(place), fix="give another --study or --study-name, or the same settings")
    if found is None:
        study.set_user_attr("settings", settings)
    return study, found is None


def shown(text: str, place: str | None = None) -> str:
    """The text without the password of a storage URL."""
    for url in {place or text}:
        head, at, tail = url.rpartition("@")
        scheme, mark, login = head.partition("://")
        if at and mark and ":" in login:
            secret = login.partition(":")[2]
            text = text.replace(url, f"{scheme}://{login.partition(':')[0]}:***@{tail}").replace(secret, "***")
    return text


def claim(study: optuna.Study, total: int) -> optuna.Trial | None:
    """A trial to run, marked as this process's; None when `total` are done or being done."""
    if len(_counted(study)) >= total:
        return None
    trial = study.ask()
    trial.set_user_attr("owner", _me() | {"seen": time.time()})
    # Two processes may both have seen room for one more trial: the later one gives way.
    if [t.number for t in _counted(study)].index(trial.number) >= total:
        trial.set_user_attr("surplus", True)
        study.tell(trial, state=TrialState.FAIL)
        return None
    return trial


def beat(trial: optuna.Trial) -> bool:
    """Record that this trial is still running; False when another process has given it up for dead."""
    try:
        trial.set_user_attr("seen", time.time())
    except (optuna.exceptions.UpdateFinishedTrialError, KeyError):
        return False
    return True


def finish(study: optuna.Study, trial: optuna.Trial, kept: float, cost: float, **facts: Any) -> None:
    """Record the result of a trial; it is dropped if another process has given the trial up for dead."""
    try:
        # One attribute, not one each: every write to a shared storage waits for its turn and for the disk.
        trial.set_user_attr("facts", {"of_dense": kept, "cost": cost, **facts})
        study.tell(trial, [kept, cost], skip_if_finished=True)
    except (optuna.exceptions.UpdateFinishedTrialError, KeyError):
        return


def fail(study: optuna.Study, trial: optuna.Trial, error: str) -> None:
    """Record that the recipe of a trial cannot be run here, so that it is not tried again."""
    try:
        trial.set_user_attr("error", error)
        study.tell(trial, state=TrialState.FAIL)
    except (optuna.exceptions.UpdateFinishedTrialError, ValueError):
        return


def give_back(study: optuna.Study, number: int) -> bool:
    """Mark a running trial failed and queue its parameters again; False when another process already did."""
    trial = next(t for t in study.get_trials(deepcopy=False) if t.number == number)
    try:
        study.tell(number, state=TrialState.FAIL)
    except (optuna.exceptions.UpdateFinishedTrialError, ValueError, RuntimeError):
        return False
    deaths = trial.user_attrs.get("deaths", 0) + 1
    params = trial.params or trial.system_attrs.get("fixed_params")
    if params and deaths <= RETRIES:  # a recipe that kills its process must not do so for ever
        _wait(study, params, trial.user_attrs.get("recipe"), deaths=deaths, retry_of=number)
    return True


def sweep(study: optuna.Study) -> int:
    """Give back the trials whose process is dead; returns how many."""
    return sum(give_back(study, t.number) for t in _in(study, TrialState.RUNNING) if _is_dead(t))


def start_with(study: optuna.Study, first: list[tuple[dict[str, Any], Any]]) -> None:
    """Queue these (params, recipe or None) as the first trials."""
    for params, recipe in first:
        _wait(study, params, recipe.to_dict() if recipe else None)


def reopen(study: optuna.Study, floor: float) -> int:
    """Queue trials again that a higher floor stopped and this one would not; returns how many."""
    again = 0
    for t in _counted(study):
        if t.state == TrialState.COMPLETE and not facts_of(t)["whole"] and facts_of(t)["of_dense_ci"][1] >= floor:
            _wait(study, t.params, t.user_attrs.get("recipe"), again_of=t.number)
            again += 1
    return again


def running(study: optuna.Study) -> int:
    """Trials that some process is at work on."""
    return len(_in(study, TrialState.RUNNING))


def finished(study: optuna.Study) -> list[FrozenTrial]:
    """Told trials, each set of parameters once, in the order of their numbers."""
    return [t for t in _counted(study) if t.state == TrialState.COMPLETE]


def facts_of(trial: FrozenTrial) -> dict[str, Any]:
    """What `finish` was told."""
    return trial.user_attrs["facts"]


def counted(study: optuna.Study) -> int:
    """Trials done or being done."""
    return len(_counted(study))


def _counted(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that count, by number: finished, running, and those that cannot be run; not those given back or run again."""
    trials = study.get_trials(deepcopy=False)
    again = {t.user_attrs.get("again_of") for t in trials if t.state != TrialState.FAIL}
    here = (TrialState.COMPLETE, TrialState.RUNNING)
    return [t for t in trials if t.number not in again and (t.state in here or "error" in t.user_attrs)]


def _in(study: optuna.Study, *states: TrialState) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=states)


def _wait(study: optuna.Study, params: dict[str, Any], recipe: dict[str, Any] | None, **facts: Any) -> None:
    study.enqueue_trial(params, user_attrs={**({"recipe": recipe} if recipe else {}), **facts})


def _me() -> dict[str, Any]:
    """Which process this is, among all machines: a pid alone may be used again, or belong to another container."""
    try:
        inside = f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        inside = ""
    process = psutil.Process()
    return {"host": f"{socket.gethostname()} {inside}".strip(), "pid": process.pid, "born": process.create_time()}


def _is_dead(trial: FrozenTrial) -> bool:
    owner = trial.user_attrs.get("owner")
    if owner is None:
        assert trial.datetime_start is not None  # it is running
        return abs(time.time() - trial.datetime_start.timestamp()) > _NAMELESS
    if owner["host"] != _me()["host"]:
        return abs(time.time() - trial.user_attrs.get("seen", owner["seen"])) > SILENCE
    try:
        return abs(psutil.Process(owner["pid"]).create_time() - owner["born"]) > 1
    except psutil.NoSuchProcess:
        return True


def _created(place: str, name: str, sampler: Sampler, attempts: int = 4) -> optuna.Study:
    for attempt in range(attempts):
        try:
            storage = _storage(place)
            return optuna.create_study(
                storage=storage,
                study_name=name,
                sampler=sampler,
                directions=["maximize", "minimize"],
                load_if_exists=True,
            )
        except Exception as e:
            # Processes that start at the same time both create the tables; the slower one fails, and finds them a moment later.
            raced = any(word in f"{type(e).__name__} {e}" for word in ("Integrity", "exists", "locked"))
            if attempt + 1 == attempts or not raced:
                raise
            time.sleep(0.5 * (attempt + 1))
    raise AssertionError("not reached")


def _storage(place: str) -> Any:
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend

    if "://" in place:
        return RDBStorage(place)
    path = expanded(place)
    if path.is_dir():
        raise InputError("is a directory", where=path, fix="give a file to --study, or a storage URL")
    if not path.parent.is_dir():
        raise InputError(f"no directory {path.parent}", where=path, fix="create it first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InputError("no permission to write", where=path, fix="give another --study")
    if _kind(path) == "sqlite":
        # Several processes share the file: wait for each other's writes instead of failing.
        return RDBStorage(f"sqlite:///{path.absolute()}", engine_kwargs={"connect_args": {"timeout": 120}})
    return JournalStorage(JournalFileBackend(str(path)))


def _kind(path: Path) -> str:
    """sqlite or journal, by contents where there are any. Raises InputError for a file that is neither."""
    refused = InputError("is not a study", where=path, fix="give a new file or one that `cm-export tune` made")
    if not path.exists() or path.stat().st_size == 0:
        return "sqlite" if path.suffix in _SQLITE else "journal"
    with open(path, "rb") as f:
        head = f.readline(1_000_000)
    if head.startswith(b"SQLite format 3\0"):
        try:
            with sqlite3.connect(f"file:{path.absolute()}?mode=ro", uri=True) as db:
                tables = {name for (name,) in db.execute("select name from sqlite_master where type = 'table'")}
        except sqlite3.Error as e:
            raise refused from e
        if tables and "studies" not in tables:  # somebody else's data: add no tables to it
            raise refused
        return "sqlite"
    try:
        is_journal = "op_code" in json.loads(head)
    except (ValueError, TypeError):
        is_journal = False
    if not is_journal:
        raise refused
    return "journal"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return text if len(text) <= 40 else f"{text[:12]}..."
