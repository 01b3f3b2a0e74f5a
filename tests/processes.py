"""Real runs of the real scripts, each in a process of its own.

Such a process is forked from one that has torch in memory already: importing it takes longer than most runs.
"""
import atexit
import csv
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file

import drr

REPO = Path(drr.__file__).resolve().parent
PHOTOS = REPO / "tests" / "photos"
# On the CPU, where there is a GPU, too: what must be bit-identical, or names the device, is the CPU's.
ENVIRONMENT = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(REPO),
               "CUDA_VISIBLE_DEVICES": ""}
SECONDS = 900               # after that a run hangs: far more than one takes on a busy machine

SERVER = """
import contextlib, gc, json, os, runpy, socket, sys
import torch, torch._dynamo, torch._subclasses.fake_tensor, torch.distributed
import train_transformer, train_vae
from support import runs
with contextlib.suppress(ImportError):       # requirements-tools.txt, which the scripts do without
    import matplotlib.backends.backend_agg, matplotlib.figure, matplotlib.font_manager

runs.matrix_rate = lambda *_: 1e11           # to measure it takes as long as a few steps
gc.freeze()                                  # else each run looks through all of torch's objects as it ends

def become_ranks(count):
    # Returns in each of them, while this process waits as torchrun does: with the store where they meet.
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))          # nobody else is given this port; the store below may listen
    port = reserved.getsockname()[1]
    for rank in map(str, range(count)):
        if os.fork() == 0:
            torch.set_num_threads(1)
            return os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=str(count), MASTER_PORT=str(port),
                                     MASTER_ADDR="127.0.0.1", TORCHELASTIC_USE_AGENT_STORE="True")
    store = torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    os._exit(any([os.wait()[1] for _ in range(count)]))

print(flush=True)                            # it is ready
for line in sys.stdin:                       # answers with the pid, then with the exit status
    task = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        for number, path in ((1, task["out"]), (2, task["err"])):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.chdir(task["cwd"])
        sys.modules.update(dict.fromkeys(task["without"]))         # those are not found
        if task["ranks"]:
            become_ranks(task["ranks"])
        exec(task["before"], {})
        sys.argv = task["arguments"]
        if sys.argv[0].endswith(".py"):
            runpy.run_path(sys.argv[0], run_name="__main__")
        else:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        sys.exit()
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@functools.cache
def server():
    """The process to fork from, and a folder for what the runs print."""
    folder = tempfile.TemporaryDirectory()
    process = subprocess.Popen([sys.executable, "-c", SERVER], env=ENVIRONMENT, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    atexit.register(process.communicate)     # closes its input: it ends
    process.stdout.readline()
    return process, folder


def start(script, *arguments, cwd, without=None, ranks=0, before=""):
    """Begins `python SCRIPT ARGUMENTS`, a script of this repository; returns its process number. One by one.
    without: modules that it shall not find; of a training matplotlib, since plots take as long as it does.
    ranks: how many processes share the run, as by torchrun; before: Python code that each runs first."""
    process, folder = server()
    out, err = (str(Path(folder.name, name)) for name in ("out", "err"))
    if without is None:
        without = ["matplotlib"] if Path(script).stem.startswith("train_") else []
    if script.endswith(".py"):                                 # otherwise it is a module, as for python -m
        script = str(REPO / script)
    task = {"arguments": [script, *map(str, arguments)], "cwd": str(cwd), "out": out, "err": err,
            "without": without, "ranks": ranks, "before": before}
    print(json.dumps(task), file=process.stdin, flush=True)
    return int(process.stdout.readline())


def wait(pid):
    """The end of that run: returncode (-9 if it was killed), stdout, stderr, and both as `output`."""
    process, folder = server()
    timer = threading.Timer(SECONDS, os.killpg, (pid, signal.SIGKILL))
    timer.start()
    returncode = int(process.stdout.readline())
    timer.cancel()
    out, err = (Path(folder.name, name).read_text() for name in ("out", "err"))
    return SimpleNamespace(returncode=returncode, stdout=out, stderr=err, output=out + err)


def execute(first, *arguments, cwd, **options):
    """Runs `python ARGUMENTS`; the first is a script, a module such as tools.evaluate, or `-c`."""
    if first != "-c":
        return wait(start(first, *arguments, cwd=cwd, **options))
    return subprocess.run([sys.executable, first, *map(str, arguments)], cwd=cwd, env=ENVIRONMENT,
                          capture_output=True, text=True, timeout=SECONDS)


def run(*arguments, cwd):
    """The same for a run that must succeed."""
    return finished(execute(*arguments, cwd=cwd))


def torchrun(count, script, *arguments, cwd, before=""):
    """torchrun itself with `count` processes on this machine, each of which imports torch anew."""
    wrapped = Path(cwd) / "wrapped.py"
    wrapped.write_text(f"import runpy, sys\nsys.modules['matplotlib'] = None\n{before}\n"
                       f"runpy.run_path({str(REPO / script)!r}, run_name='__main__')\n")
    return execute("torch.distributed.run", "--standalone", f"--nproc_per_node={count}", wrapped, *arguments,
                   cwd=cwd)


# === Trainings ==============================================================================================
STAGES = ("vae", "transformer")
SPEEDS = ("images_per_s", "mfu")        # columns that are a matter of the machine


def train(stage, *arguments, **options):
    return execute(f"train_{stage}.py", *arguments, **{"cwd": REPO, **options})


def finished(done):
    assert done.returncode == 0, done.output
    return done


def refused(done, *expected):
    """The one line `error: ...` with which a run ended, and which names all that is expected."""
    errors = [line for line in done.output.splitlines() if "error: " in line]
    assert done.returncode == 2 and "Traceback" not in done.output and len(errors) == 1, done.output
    assert all(words.lower() in errors[0].lower() for words in expected), done.output
    return errors[0]


def receives(name, step, rank=0):
    """Code, to run before a training: the process of this rank gets the signal of this name in that step."""
    return f"""
import os, signal
from support import runs
rate = runs.learning_rate
def learning_rate(step, *rest):
    if step == {step - 1} and runs.ranks()[0] == {rank}:
        os.kill(os.getpid(), signal.{name})
    return rate(step, *rest)
runs.learning_rate = learning_rate
"""


def rows(folder, stage):
    with open(folder / f"{stage}.csv", newline="") as f:
        return [{k: v for k, v in row.items() if k not in SPEEDS} for row in csv.DictReader(f)]


def weights(folder, stage):
    return load_file(folder / f"{stage}.safetensors")


def another_vae(path, other):
    """Writes the RQ-VAE in the file `path` with other codes into the file `other`; returns its path."""
    vae, section = drr.load_vae(path)
    vae.quantizer.codebook += 1
    drr.save_vae(other, vae, SimpleNamespace(vae=section))
    return other


def assert_same(a, b, stage):
    """Two folders hold the same training: every number of the log, every bit of the weights."""
    assert rows(a, stage) == rows(b, stage)
    one, two = weights(a, stage), weights(b, stage)
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
