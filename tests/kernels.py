"""Kernels that start at once: forked from a process that has imported the libraries, not the package.

A fresh kernel spends most of its time importing PyTorch. `offer` writes a kernel specification into a folder for `JUPYTER_PATH`; its
command, a client of a few lines, asks the parent of all kernels for a fork, hands it its own streams, working directory and environment,
and stands for it: a signal to the client reaches the kernel, the death of either is the death of both. The parent starts with the first
client and goes with the session of tests that offered it.
"""
import json
import os
import signal
import socket
import sys

LIBRARIES = ("torch", "torchvision", "open_clip", "torch._dynamo", "timm", "sklearn.linear_model", "sklearn.metrics", "sklearn.cluster", "scipy.stats", "pandas", "pyarrow.parquet",
             "matplotlib.figure", "PIL.Image", "IPython", "ipykernel.kernelapp", "nibabel", "transformers", "safetensors.torch")


def offer(folder) -> None:
    "Write the kernel specification `python3`, for a `JUPYTER_PATH` that begins with this folder"
    spec = {"argv": [sys.executable, "-I", "-S", os.path.abspath(__file__), "client", str(folder), str(os.getpid()), "ipykernel_launcher", "-f", "{connection_file}"],
            "display_name": "Python 3 (forked)", "language": "python"}
    os.makedirs(kernels := os.path.join(folder, "kernels", "python3"), exist_ok=True)
    with open(os.path.join(kernels, "kernel.json"), "w", encoding="utf-8") as f: json.dump(spec, f)


def _connect(folder: str, session: str) -> socket.socket:
    "A connection to the parent of all kernels, started if nobody has"
    import fcntl
    import time
    with open(os.path.join(folder, "lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        conn = socket.socket(socket.AF_UNIX)
        address = os.path.join(folder, "socket")
        try:
            conn.connect(address)
            return conn
        except OSError: pass
        if os.path.exists(address): os.unlink(address)
        environment = {**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
        if not os.fork():
            os.setsid()
            null, log = os.open(os.devnull, os.O_RDWR), os.open(os.path.join(folder, "log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for old, new in ((null, 0), (log, 1), (log, 2)): os.dup2(old, new)
            os.closerange(3, 1024)
            os.execve(sys.executable, [sys.executable, __file__, "serve", folder, session], environment)
        while True:
            try:
                conn.connect(address)
                return conn
            except OSError: time.sleep(0.02)


def client(folder: str, session: str, *words: str) -> int:
    "Ask for a kernel and stand for it; its exit status"
    import select
    parent, conn = os.getppid(), _connect(folder, session)
    pipe = os.pipe()
    for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, lambda n, _: os.write(pipe[1], bytes([n])))
    body = json.dumps({"words": words, "cwd": os.getcwd(), "environment": dict(os.environ)}).encode()
    socket.send_fds(conn, [len(body).to_bytes(8, "big")], [0, 1, 2])
    conn.sendall(body)
    while os.getppid() == parent:
        ready = select.select([conn, pipe[0]], [], [], 0.5)[0]
        if pipe[0] in ready: conn.sendall(os.read(pipe[0], 1))
        if conn in ready: return int.from_bytes(conn.recv(1) or b"\1", "big")
    return 1


def _run(asked: dict) -> None:
    "Be the kernel that was asked for"
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["cwd"])
    sys.argv = list(asked["words"])
    sys.path[:] = [asked["cwd"], *(p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p), *sys.path[1:]]
    from ipykernel import kernelapp
    kernelapp.launch_new_instance()


def _keep(conn: socket.socket) -> None:
    "Fork a kernel and stay beside it until it or its client is gone"
    import select
    head, fds, *_ = socket.recv_fds(conn, 8, 3)
    length, body = int.from_bytes(head, "big"), b""
    while len(body) < length: body += conn.recv(length - len(body))
    for new, old in enumerate(fds): os.dup2(old, new)
    for fd in fds: os.close(fd)
    done = os.pipe()
    kernel = os.fork()
    if not kernel:
        conn.close()
        os.close(done[0])
        signal.signal(signal.SIGINT, signal.default_int_handler)
        status = 1
        try: status = _run(json.loads(body)) or 0
        except SystemExit as e: status = e.code if isinstance(e.code, int) else bool(e.code)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    os.close(done[1])
    while True:
        ready = select.select([conn, done[0]], [], [])[0]
        if done[0] in ready: break
        said = conn.recv(1)
        os.kill(kernel, said[0] if said else signal.SIGKILL)
        if not said: break
    status = os.waitpid(kernel, 0)[1]
    code = os.waitstatus_to_exitcode(status)
    try: conn.sendall(bytes([code if code >= 0 else 128 - code]))
    except OSError: pass


def _alive(process: int) -> bool:
    "Whether a process runs"
    try: os.kill(process, 0)
    except OSError: return False
    return True


def serve(folder: str, session: str) -> None:
    "Import the libraries, then fork a kernel for each client, until the session of tests is over"
    import importlib
    import select
    server = socket.socket(socket.AF_UNIX)
    server.bind(os.path.join(folder, "socket"))
    server.listen(64)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for name in LIBRARIES: importlib.import_module(name)
    while os.path.exists(os.path.join(folder, "socket")) and _alive(int(session)):
        if not select.select([server], [], [], 1)[0]: continue
        conn = server.accept()[0]
        if not os.fork():
            server.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            try: _keep(conn)
            finally: os._exit(0)
        conn.close()


if __name__ == "__main__": sys.exit({"client": client, "serve": serve}[sys.argv[1]](*sys.argv[2:]))
