"""Tasks that exchange in rounds, side by side: what they send at the same time travels together.

A task is a generator. It yields a message that goes to every rank and is sent what came from all of
them, as often as it likes, and returns its result. Tasks that run together send the messages of
their first rounds in one collective, then those of their second, and so on: on a fast network a
collective costs more than the bytes in it.
"""

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from dqrm.comm.errors import AgreedError

T = TypeVar("T")
Out = TypeVar("Out")
In = TypeVar("In")

Send = Callable[[Sequence[Out]], Sequence[In | AgreedError]]
"""Sends some messages, in the same order on every rank, and returns what came for each of them."""


class RoundTask(Generic[Out, In, T]):
    """A generator on its way, and the future of its result."""

    def __init__(self, rounds: Generator[Out, In, T], future: "Future[T]") -> None:
        self.future = future
        self._rounds = rounds

    def advance(self, answer: In | AgreedError | None) -> Out | None:
        """Go on to the next message; None at the end, when the future knows the result.

        Raises:
            BaseException: what the task raised and other ranks may not share.
        """
        try:
            if isinstance(answer, AgreedError):
                return self._rounds.throw(answer)
            # A generator that begins takes None, whatever it takes later on.
            return self._rounds.send(answer)  # type: ignore[arg-type]
        except StopIteration as end:
            self.future.set_result(end.value)
        except AgreedError as error:
            self.future.set_exception(error)
        return None


def run_together(tasks: Sequence[RoundTask[Out, In, Any]], send: Send[Out, In] | None) -> None:
    """Run tasks to their ends; all ranks run the same ones in the same order.

    Raises:
        BaseException: a task or sending failed in a way that other ranks may not share. All futures
            without a result know it.
    """
    try:
        answers: Sequence[In | AgreedError | None] = [None] * len(tasks)
        while tasks:
            asked = [
                (task, task.advance(answer)) for task, answer in zip(tasks, answers, strict=True)
            ]
            going = [(task, message) for task, message in asked if message is not None]
            tasks = [task for task, _ in going]
            if going:
                assert send is not None
                answers = send([message for _, message in going])
            else:
                answers = []
    except BaseException as error:
        for task in tasks:
            if not task.future.done():
                task.future.set_exception(error)
        raise


def run_alone(rounds: Generator[Out, In, T], send: Send[Out, In]) -> T:
    """Run one task and return its result, or raise its error."""
    future: Future[T] = Future()
    run_together([RoundTask(rounds, future)], send)
    return future.result()
