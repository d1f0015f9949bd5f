"""How this program's processes run: none searches the current folder for code, and none outlives its parent.

A cloned model is a folder that others have filled, and `cd model && tightrope serve .` a natural way to serve it.
Python searches the current folder for modules when it is started with -m, and where PYTHONPATH has an empty part; the
loader of libraries and the shell do so where their paths have one, as `PATH=$PATH:...` of an empty variable leaves it.

Imports only what Python has loaded by itself when this runs, because the current folder may still be searched then.
"""

import os
import sys

_PATHS = ("PYTHONPATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PATH")  # folders in which code is looked for
# All that a process without secrets needs: where Python finds its files and modules, languages, and the time of day.
_BARE = ("PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "LC_TIME", "TZ")
_OWN_SETTINGS = "TIGHTROPE_"
_KEYS = ("API_KEY",)  # That is a setting, too, where the variables of TGI's launcher are read.
# Else ggml runs gdb over itself when it aborts, for 20 s and 100 lines, and Rust traces where a tokenizer panics.
_TERSE = {"GGML_NO_BACKTRACE": "1", "RUST_BACKTRACE": "0"}


def search_no_current_folder() -> None:
    """Take the current folder, and what lies in it, off the search paths of this process and of those that it starts.

    Parts that are absolute stay: they name the same folder wherever one is.
    """
    try:
        here = os.getcwd()
    except OSError:
        return  # it was deleted, so nothing is found in it
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None and spec.name == "tightrope.__main__" and not sys.flags.safe_path and sys.path[0] == here:
        del sys.path[0]  # `python -m` has put it there
    for name in _PATHS:
        parts = os.environ.get(name, "").split(os.pathsep)
        absolute = [part for part in parts if os.path.isabs(part)]
        if name not in os.environ or absolute == parts:
            continue
        if name == "PYTHONPATH":  # whose parts Python has made absolute
            dropped = set(map(os.path.realpath, parts)) - set(map(os.path.realpath, absolute))
            sys.path[:] = [path for path in sys.path if os.path.realpath(path) not in dropped]
        os.environ[name] = os.pathsep.join(absolute)
        if not absolute:
            del os.environ[name]
    search_absolute_folders()


def search_absolute_folders() -> None:
    """Take what is relative off the modules' search path, such as the marker of an editable installation."""
    sys.path[:] = [path for path in sys.path if os.path.isabs(path)]


def open_closed_streams() -> None:
    """Open /dev/null where standard input, output or error is closed.

    The next file or socket that is opened would take the number, and get what is meant for the stream.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it has taken the lowest number that was free
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115


def child_command(module: str, *arguments: str) -> list[str]:
    """The command that runs a module in a process that ends with this one.

    The process must be started by a thread that lives as long as it: on Linux the death of that thread ends it.
    """
    return [sys.executable, "-P", "-m", __name__, str(os.getpid()), module, *arguments]


def child_environment() -> dict[str, str]:
    """This process' environment, without its own settings: a child is told what it needs, and no keys."""
    kept = {name: os.environ[name] for name in os.environ if not name.startswith(_OWN_SETTINGS) and name not in _KEYS}
    return kept | _TERSE


def set_variables(variables: dict[str, str]) -> None:
    """Set these in this process' environment, for libraries that are configured by nothing else, where nobody has."""
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def bare_environment() -> dict[str, str]:
    """The environment of a process that runs what strangers wrote: nothing in it is secret."""
    return {name: os.environ[name] for name in _BARE if name in os.environ} | _TERSE


def end_with_parent(parent: int) -> None:
    """End this process when its parent, of this id, has ended or ends. Only Linux tells a process of the latter."""
    if sys.platform == "linux":
        import ctypes
        import signal

        set_parent_death_signal = 1  # PR_SET_PDEATHSIG in <linux/prctl.h>
        ctypes.CDLL(None).prctl(set_parent_death_signal, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # it ended before the signal was asked for
        os._exit(1)


def limit_cpu(seconds: int) -> None:
    """Let this process be ended by SIGXCPU when it has computed for so long from now on."""
    import math
    import resource

    usage = resource.getrusage(resource.RUSAGE_SELF)
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    limit = math.ceil(usage.ru_utime + usage.ru_stime) + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (limit if most == resource.RLIM_INFINITY else min(limit, most), most))


def _main() -> None:
    end_with_parent(int(sys.argv[1]))
    search_absolute_folders()
    import runpy

    module = sys.argv[2]
    sys.argv[:] = sys.argv[2:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _main()
