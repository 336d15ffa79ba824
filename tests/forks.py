"""Commands and kernels that start at once: forked from a process that has imported the libraries and the package.

A fresh process spends most of its time importing PyTorch. `offer` writes into a folder the commands `medclip-nb` and
`python`, and a Jupyter kernel `python3` for `JUPYTER_PATH`. Each is a client of a few lines, which asks the parent of
all forks for one, hands it its own streams, working directory and environment, and stands for it: signals to the client
reach the fork, and the death of either is that of both. The parent starts with the first client and goes when the
session of tests that offered it is over. A fork's hash seed is 0.
"""
import json
import os
import shlex
import signal
import socket
import sys

PACKAGE = "medclip_nb"
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LIBRARIES = ("torch", "torchvision", "open_clip", "torch._dynamo", "timm", "sklearn.linear_model", "sklearn.metrics",
             "sklearn.cluster", "scipy.stats",
             "pandas", "pyarrow.parquet", "matplotlib.figure", "PIL.Image", "nibabel", "transformers",
             "safetensors.torch", "IPython",
             "ipykernel.kernelapp", "typer", "papermill", "nbformat", "mistune", "bleach", "yaml")


def offer(folder: str) -> None:
    "Write the command and the specification of the kernel"
    words = [sys.executable, "-I", "-S", os.path.abspath(__file__), "client", folder, str(os.getpid())]
    os.makedirs(kernel := os.path.join(folder, "kernels", "python3"))
    spec = {"argv": [*words, "ipykernel_launcher", "-f", "{connection_file}"], "display_name": "Python 3",
            "language": "python"}
    with open(os.path.join(kernel, "kernel.json"), "w", encoding="utf-8") as f: json.dump(spec, f)
    for name in ("medclip-nb", "python"):
        with open(script := os.path.join(folder, name), "w", encoding="utf-8") as f:
            f.write(f'#!/bin/sh\nexec {shlex.join([*words, name])} "$@"\n')
        os.chmod(script, 0o755)


def forked(name: str = "python") -> str:
    "The path of an offered command"
    return os.path.join(os.environ["MEDCLIP_NB_FORKS"], name)


def run_together(worker, processes: int, *arguments: str) -> None:
    """Call a function of a file of tests as `worker(rank, processes, *arguments)` in several processes, and wait for
    them"""
    import subprocess
    code = """
import importlib, sys
_, folder, module, name, rank, processes, *arguments = sys.argv
sys.path.insert(0, folder)
getattr(importlib.import_module(module), name)(int(rank), int(processes), *arguments)"""
    words = [forked(), "-c", code, os.path.dirname(os.path.abspath(__file__)), worker.__module__, worker.__name__]
    started = [subprocess.Popen([*words, str(rank), str(processes), *map(str, arguments)], stderr=subprocess.PIPE,
                                text=True) for rank in range(processes)]
    said = [process.communicate()[1] for process in started]
    assert all(process.returncode == 0 for process in started), "\n".join(said)


def _start(folder: str, session: str) -> None:
    "Start the parent of all forks"
    environment = {**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1",
                   "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    if os.fork(): return
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # `nohup make test` ignores it
    null, log = os.open(os.devnull, os.O_RDWR), os.open(os.path.join(folder, "log"),
                                                        os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for old, new in ((null, 0), (log, 1), (log, 2)): os.dup2(old, new)
    os.closerange(3, 1024)
    os.execve(sys.executable, [sys.executable, __file__, "serve", folder, session], environment)


def _connect(folder: str, session: str) -> socket.socket:
    "A connection to the parent of all forks"
    import fcntl
    import time
    conn, address = socket.socket(socket.AF_UNIX), os.path.join(folder, "socket")
    with open(os.path.join(folder, "lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.path.exists(address): _start(folder, session)
        while True:
            try:
                conn.connect(address)
                return conn
            except OSError: time.sleep(0.02)


def client(folder: str, session: str, *words: str) -> int:
    "Ask for a fork and stand for it; its exit status"
    import select
    conn, pipe, parent = _connect(folder, session), os.pipe(), os.getppid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda n, _: os.write(pipe[1], bytes([n])))
    body = json.dumps({"words": words, "folder": os.getcwd(), "environment": dict(os.environ)}).encode()
    socket.send_fds(conn, [len(body).to_bytes(8, "big")], [0, 1, 2])
    conn.sendall(body)
    while os.getppid() == parent:
        ready = select.select([conn, pipe[0]], [], [], 0.5)[0]
        if pipe[0] in ready: conn.sendall(os.read(pipe[0], 1))
        if conn in ready: return int.from_bytes(conn.recv(1) or b"\1", "big")
    return 1


def _become(words: list[str], folder: str, environment: dict[str, str]) -> None:
    "Do what a process with these words would"
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = words
    sys.path[0] = folder
    if os.path.exists(os.path.join(folder, PACKAGE)) and os.path.realpath(folder) != os.path.realpath(ROOT):
        for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]: del sys.modules[name]
    sys.stdin, sys.stdout, sys.stderr = (
        open(fd, mode, encoding="utf-8", errors=errors, buffering=buffering, closefd=False)
        for fd, mode, errors, buffering in ((0, "r", "strict", -1), (1, "w", "strict", -1),
                                            (2, "w", "backslashreplace", 1)))
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    if environment.get("MPLBACKEND"): __import__("matplotlib").rcParams["backend"] = environment["MPLBACKEND"]
    {"medclip-nb": _command, "python": _interpret, "ipykernel_launcher": _kernel}[words[0]](words[1:])


def _command(words: list[str]) -> None:
    "Be the command that settings.ini declares"
    import importlib
    from configparser import ConfigParser
    sys.path.pop(0)
    (settings := ConfigParser(delimiters=["="])).read(os.path.join(ROOT, "settings.ini"), encoding="utf-8")
    module, name = settings["DEFAULT"]["console_scripts"].split("=")[1].split(":")
    getattr(importlib.import_module(module), name)()


def _interpret(words: list[str]) -> None:
    "Be Python, with `-c code`, `-m module` or a script"
    import runpy
    import types
    if words[0] == "-u": words = words[1:]
    if words[0] == "-c":
        sys.argv, sys.modules["__main__"] = ["-c", *words[2:]], (main := types.ModuleType("__main__"))
        exec(compile(words[1], "<string>", "exec"), main.__dict__)
    elif words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = words, os.path.dirname(os.path.abspath(words[0]))
        runpy.run_path(words[0], run_name="__main__")


def _kernel(words: list[str]) -> None:
    "Be a kernel"
    from medclip_nb.experiments.kernels import become_kernel
    become_kernel()


def _end(status: int) -> None:
    "What an interpreter does at its end, without returning to the code that was forked"
    import atexit
    import threading
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try: stream.flush()
        except (OSError, ValueError): pass
    os._exit(status)


def _fork(asked: dict, conn: socket.socket) -> int: # Its number
    "A fork that becomes what was asked for"
    if number := os.fork(): return number
    conn.close()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    status = 1
    try:
        _become(asked["words"], asked["folder"], asked["environment"])
        status = 0
    except SystemExit as e: status = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException: sys.excepthook(*sys.exc_info())
    finally: _end(status)
    return 0


def _keep(conn: socket.socket) -> None:
    "Fork, and stay beside the fork until it or its client is gone"
    import select
    import threading
    head, fds, *_ = socket.recv_fds(conn, 8, 3)
    body = b""
    while len(body) < int.from_bytes(head, "big"): body += conn.recv(1 << 16)
    for new, old in enumerate(fds): os.dup2(old, new)
    for fd in fds: os.close(fd)
    ends, ended = os.pipe()
    number = _fork(json.loads(body), conn)
    found = []

    def wait():
        found.append(os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]))
        os.write(ended, b".")
    threading.Thread(target=wait, daemon=True).start()
    while ends not in (ready := select.select([conn, ends], [], [])[0]):
        said = conn.recv(1) if conn in ready else b""
        os.kill(number, said[0] if said else signal.SIGKILL)
        if not said: return
    conn.sendall(bytes([found[0] if found[0] >= 0 else 128 - found[0]]))


def _alive(process: int) -> bool:
    "Whether a process runs"
    try: os.kill(process, 0)
    except OSError: return False
    return True


def own_modules() -> list[str]:
    "The modules of this repository's package"
    import pkgutil
    found = pkgutil.walk_packages([os.path.join(ROOT, PACKAGE)], f"{PACKAGE}.")
    return sorted(module.name for module in found if not module.name.rpartition(".")[2].startswith("_"))


def serve(folder: str, session: str) -> None:
    "Import the libraries, then fork for each client, until the session of tests is over"
    import gc
    import importlib
    import select
    server = socket.socket(socket.AF_UNIX)
    server.bind(address := os.path.join(folder, "socket"))
    server.listen(64)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for name in (*LIBRARIES, *own_modules()): importlib.import_module(name)
    gc.collect()
    gc.freeze() # The memory that forks share stays shared
    while os.path.exists(address) and _alive(int(session)):
        if not select.select([server], [], [], 1)[0]: continue
        conn = server.accept()[0]
        if not os.fork():
            server.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            try: _keep(conn)
            finally: os._exit(0)
        conn.close()


if __name__ == "__main__": sys.exit({"client": client, "serve": serve}[sys.argv[1]](*sys.argv[2:]))
