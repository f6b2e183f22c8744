"""Two processes with a gloo group, which run functions side by side: started once, for all tests."""

import datetime
import pickle
import traceback

import torch.multiprocessing as multiprocessing

WORLD = 2
# for a rank that waits for one that has left; the other may also be slow to start
GROUP_TIMEOUT = 60
TIMEOUT = 120


class TwoRanks:
    """Calling it with a module-level function and its arguments runs function(rank, *arguments) on both ranks."""

    def __init__(self, folder):
        self._folder = folder
        self._starts = 0
        self._processes = []

    def __call__(self, function, *arguments):
        """What each rank returned, in rank order; AssertionError with the tracebacks where one failed."""
        if not self._processes:
            self._start()
        for _, connection in self._processes:
            connection.send((function, arguments))
        answers = [self._answer(connection) for _, connection in self._processes]
        failures = [f"rank {rank}: {value}" for rank, (fine, value) in enumerate(answers) if not fine]
        if failures:
            # what they still have to say to each other is not known
            self.stop()
            raise AssertionError("\n".join(failures))
        return [value for _, value in answers]

    def stop(self):
        for process, connection in self._processes:
            connection.close()
            process.kill()
            process.join()
        self._processes = []

    def _answer(self, connection):
        if not connection.poll(TIMEOUT):
            return False, f"no answer after {TIMEOUT} s"
        try:
            return pickle.loads(connection.recv_bytes())
        except EOFError:
            return False, "the process died"

    def _start(self):
        self._starts += 1
        context = multiprocessing.get_context("spawn")
        store = f"file://{self._folder}/store{self._starts}"
        for rank in range(WORLD):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, store, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append((process, ours))


def _serve(rank, store, connection):
    import torch

    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=GROUP_TIMEOUT)
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD, timeout=timeout)
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = (True, function(rank, *arguments))
        except BaseException:
            answer = (False, traceback.format_exc())
        # by value: tensors that torch shares would need this process to live on
        connection.send_bytes(pickle.dumps(answer))
