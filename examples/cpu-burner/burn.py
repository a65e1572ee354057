"""One busy loop for each core; reports how much cpu it really got."""

import multiprocessing
import os
import signal
import threading
import time


def burn():
    while True:
        pass


def main():
    cores = os.cpu_count() or 1
    for _ in range(cores):
        multiprocessing.Process(target=burn, daemon=True).start()
    print(f"{cores} busy loops on {cores} cores", flush=True)
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda signum, frame: stopping.set())
    pids = [child.pid for child in multiprocessing.active_children()]
    before, at = used(pids), time.monotonic()
    while not stopping.wait(5):
        now, then = used(pids), time.monotonic()
        print(f"got {(now - before) / (then - at):.2f} cores of the {cores} there are", flush=True)
        before, at = now, then
    for child in multiprocessing.active_children():
        child.kill()


def used(pids):
    """Seconds of cpu the processes have used."""
    ticks = 0
    for pid in pids:
        with open(f"/proc/{pid}/stat") as stat:
            # After the command in brackets: utime and stime are fields 14 and 15 of the line.
            fields = stat.read().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
