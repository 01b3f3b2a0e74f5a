"""Real runs of the real scripts, each in a process of its own.

Such a process is forked from one that has torch in memory already: importing it takes longer than most runs.
"""
import atexit
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

from conftest import REPO

# On the CPU, where there is a GPU, too: what must be bit-identical, or names the device, is the CPU's.
ENVIRONMENT = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(REPO),
               "CUDA_VISIBLE_DEVICES": ""}
SECONDS = 900               # after that a run hangs: far more than one takes on a busy machine

SERVER = """
import contextlib, json, os, runpy, sys
import torch, torch._dynamo, torch._subclasses.fake_tensor
import train_transformer, train_vae
with contextlib.suppress(ImportError):       # requirements-tools.txt, which the scripts do without
    import matplotlib.backends.backend_agg, matplotlib.figure, matplotlib.font_manager
for line in sys.stdin:                       # answers with the pid, then with the exit status
    task = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        for number, path in ((1, task["out"]), (2, task["err"])):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.chdir(task["cwd"])
        sys.modules.update(dict.fromkeys(task["without"]))         # those are not found
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
    return process, folder


def start(script, *arguments, cwd, without=None):
    """Begins `python SCRIPT ARGUMENTS`, a script of this repository; returns its process number. One by one.
    without: modules that it shall not find; of a training matplotlib, since plots take as long as it does."""
    process, folder = server()
    out, err = (str(Path(folder.name, name)) for name in ("out", "err"))
    if script.endswith(".py"):                                 # otherwise it is a module, as for python -m
        script = str(REPO / script)
    arguments = [script, *map(str, arguments)]
    if without is None:
        without = ["matplotlib"] if Path(script).stem.startswith("train_") else []
    task = {"arguments": arguments, "cwd": str(cwd), "out": out, "err": err, "without": without}
    print(json.dumps(task), file=process.stdin, flush=True)
    return int(process.stdout.readline())


def wait(pid):
    """The end of that run: returncode (-9 if it was killed), stdout, stderr, and both as `output`."""
    process, folder = server()
    timer = threading.Timer(SECONDS, os.kill, (pid, signal.SIGKILL))
    timer.start()
    returncode = int(process.stdout.readline())
    timer.cancel()
    out, err = (Path(folder.name, name).read_text() for name in ("out", "err"))
    return SimpleNamespace(returncode=returncode, stdout=out, stderr=err, output=out + err)


def execute(first, *arguments, cwd, without=None):
    """Runs `python ARGUMENTS`; the first is a script, a module such as tools.evaluate, or `-c`."""
    if first != "-c":
        return wait(start(first, *arguments, cwd=cwd, without=without))
    return subprocess.run([sys.executable, first, *map(str, arguments)], cwd=cwd, env=ENVIRONMENT,
                          capture_output=True, text=True, timeout=SECONDS)


def run(*arguments, cwd):
    """The same for a run that must succeed."""
    done = execute(*arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done


def torchrun(count, script, *arguments, cwd, wrapper="", timeout=SECONDS):
    """torchrun with `count` processes on this machine, for a script of this repository or a module such as
    tools.evaluate. wrapper: Python code to run before the script. Returns returncode and `output`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    if script.startswith("train_"):
        wrapper = "sys.modules['matplotlib'] = None\n" + wrapper    # no plots, as in `start`
    if script.endswith(".py"):
        script = str(REPO / script)
        runner = "run_path"
        command.append(script)
    else:
        runner = "run_module"
        command += ["-m", script]
    if wrapper:
        wrapped = cwd / "wrapped.py"
        wrapped.write_text(f"import runpy, sys\nsys.path.insert(0, {str(REPO)!r})\n{wrapper}\n"
                           f"runpy.{runner}({script!r}, run_name='__main__')\n")
        command = [*command[:5], str(wrapped)]        # in the place of the script
    done = subprocess.run([*command, *map(str, arguments)], cwd=cwd, env=ENVIRONMENT, capture_output=True,
                          text=True, timeout=timeout)
    return SimpleNamespace(returncode=done.returncode, output=done.stdout + done.stderr)
