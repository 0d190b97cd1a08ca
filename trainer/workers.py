"""What a process that reads data ahead for the trainer does when it begins."""

import multiprocessing
import os
import signal
import threading


def belong_to_the_main_process(worker: int) -> None:
    """Leave signals to the main process, and end with it, however it ends.

    A terminal sends Ctrl-C to every process; a worker that dies of it would take the last step with
    it. And torch's own watchdog asks whether the worker's parent has changed; that is the fork
    server, which lives as long as a worker does: of a main process that was killed, both stayed.

    Args:
        worker: Its number, which torch passes.
    """
    del worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_main_process, daemon=True).start()


def _end_with_the_main_process() -> None:
    main = multiprocessing.parent_process()
    assert main is not None
    main.join()
    os._exit(1)
