"""Jobs that need each other, several at a time."""

from collections.abc import Callable, Collection, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait


def side_by_side(
    needs: Mapping[str, Collection[str]],
    work: Callable[[str], None],
    workers: int = 1,
    after: Callable[[str], None] = lambda name: None,
) -> None:
    """Do each job once all that it needs are done: in the order of `needs`, so many at a time.

    A job that fails holds up those that need it; the others are done first.

    Args:
        needs: job → jobs among these that come first.
        work: does a job, in a thread of its own.
        after: is called with each job that is done, one at a time.

    Raises:
        Exception: of `work`, if one job failed.
        ChildProcessError: several failed, with what each said.
    """
    waiting = list(needs)
    done: set[str] = set()
    failed: list[BaseException] = []
    running: dict[Future[None], str] = {}
    with ThreadPoolExecutor(workers) as pool:
        while True:
            ready = [name for name in waiting if set(needs[name]) <= done][: workers - len(running)]
            running |= {pool.submit(work, name): name for name in ready}
            waiting = [name for name in waiting if name not in ready]
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name, error = running.pop(future), future.exception()
                if error is None:
                    done.add(name)
                    after(name)
                else:
                    print(f"== {name} failed: {error}", flush=True)
                    failed.append(error)
    if len(failed) == 1:
        raise failed[0]
    if failed:
        raise ChildProcessError("; ".join(map(str, failed)))
