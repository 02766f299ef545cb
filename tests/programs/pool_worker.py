"""A worker for the tests of the process pool: it answers with what it finds, or dies as told."""

import os
import time
from multiprocessing.connection import Connection

from robot import eval_pool


def obey(pipe: Connection, greeting: str) -> None:
    while job := eval_pool.receive(pipe):
        if job["do"] == "die":
            os._exit(3)
        if job["do"] == "sleep":
            time.sleep(600)
        found = {"n": job.get("n"), "greeting": greeting, "threads": os.environ["OMP_NUM_THREADS"], "pid": os.getpid()}
        eval_pool.answer(pipe, found | ({"leaving": True} if job["do"] == "leave" else {}))
        if job["do"] == "leave":
            return
