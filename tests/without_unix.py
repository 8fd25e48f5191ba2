"""Code that takes away what Windows lacks: modules, functions, signals and files of Unix."""

from __future__ import annotations

__all__ = ["WITHOUT_UNIX"]

WITHOUT_UNIX = """
import builtins, io, multiprocessing, os, re, signal, subprocess, sys
import torch  # it and what it imports look at sys.platform
for name in ("fcntl", "grp", "pty", "pwd", "resource", "syslog", "termios", "tty"):
    sys.modules[name] = None
starts = ("fork", "sched_", "wait", "posix_", "spawn", "set", "P_")
gone = {name for name in dir(os) if name.startswith(starts)} - {"waitpid", "waitstatus_to_exitcode"}
gone |= {"chown", "fchmod", "fchown", "geteuid", "getgid", "getegid", "getpgid", "getuid", "killpg"}
gone |= {"lchown", "mkfifo", "O_CLOEXEC", "O_DIRECTORY", "O_NOFOLLOW", "register_at_fork"}
gone |= {"statvfs", "sysconf", "uname"}
for name in gone & {*dir(os)}:
    delattr(os, name)
subprocess._USE_POSIX_SPAWN = False  # the switch that Python's documentation names
kept = {"SIGABRT", "SIGFPE", "SIGILL", "SIGINT", "SIGSEGV", "SIGTERM"}
for name in {name for name in dir(signal) if re.match("SIG[A-Z]", name)} - kept:
    delattr(signal, name)
subprocess.Popen.kill = lambda self: os.kill(self.pid, 9)  # Windows' needs no signal

opened = io.open
def without_proc(file, *args, **kwargs):
    if str(file).startswith(("/proc/", "/sys/")):
        raise FileNotFoundError(2, "No such file or directory", str(file))
    return opened(file, *args, **kwargs)
io.open = builtins.open = without_proc
multiprocessing.set_start_method("spawn", force=True)
"""
