"""Readers in an event loop are woken, however many they are, by one call of the loop's."""

import asyncio
import gc
import threading
import weakref

import pytest

from dvi_jax.serve.waking import held_back, waker


class Counted:
    """Calls of a loop's `call_soon_threadsafe`."""

    def __init__(self, loop, monkeypatch):
        self.calls, call = 0, loop.call_soon_threadsafe

        def counted(*given):
            self.calls += 1
            return call(*given)

        monkeypatch.setattr(loop, "call_soon_threadsafe", counted)


def in_thread(work):
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_all_that_is_held_back_is_one_call(monkeypatch):
    async def main():
        events = [asyncio.Event() for _ in range(20)]
        counted, one = Counted(asyncio.get_running_loop(), monkeypatch), waker()
        early = []

        def wake():
            with held_back():
                for event in events:
                    one.set(event)
                early.append(counted.calls)

        thread = in_thread(wake)
        await asyncio.wait_for(asyncio.gather(*(event.wait() for event in events)), 10)
        thread.join()
        return early, counted.calls

    assert asyncio.run(main()) == ([0], 1)


def test_what_comes_while_the_loop_has_yet_to_look_is_no_other_call(monkeypatch):
    async def main():
        first, second, third = events = [asyncio.Event() for _ in range(3)]
        counted, one = Counted(asyncio.get_running_loop(), monkeypatch), waker()
        for event in (first, second):  # this thread is the loop's, which looks when it waits
            one.set(event)
        calls = counted.calls
        await asyncio.wait_for(second.wait(), 10)
        one.set(third)  # asked for anew
        await asyncio.wait_for(third.wait(), 10)
        return calls, counted.calls, [event.is_set() for event in events]

    assert asyncio.run(main()) == (1, 2, [True] * 3)


def test_readers_are_woken_where_giving_them_something_fails():
    async def main():
        event, one = asyncio.Event(), waker()

        def fail():
            with held_back():
                one.set(event)
                raise ZeroDivisionError

        def wake():
            with pytest.raises(ZeroDivisionError):
                fail()

        thread = in_thread(wake)
        await asyncio.wait_for(event.wait(), 10)
        thread.join()

    asyncio.run(main())


def test_each_loop_has_its_own_and_one_that_is_gone_or_closed_harms_nobody():
    async def mine():
        assert waker() is waker()
        return waker()

    loops = [asyncio.new_event_loop() for _ in range(2)]
    first, second = (loop.run_until_complete(mine()) for loop in loops)
    assert first is not second
    gone = weakref.ref(loops[0])
    for loop in loops:
        loop.close()
    for one in (first, second):
        for _ in range(3):
            one.set(asyncio.Event())
        assert one._take_due() == []
    del loop, loops[0]
    gc.collect()
    assert gone() is None
    first.set(asyncio.Event())


def test_a_loop_that_is_closed_before_it_has_looked_is_let_go():
    """Whoever is told afterwards, too."""

    async def mine():
        event = asyncio.Event()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(event.wait(), 0.001)  # which ties the event to the loop
        return waker(), event

    loop = asyncio.new_event_loop()
    one, event = loop.run_until_complete(mine())
    one.set(event)  # the loop is asked, and never looks
    gone = weakref.ref(loop)
    loop.close()
    one.set(event)
    del loop, event
    gc.collect()
    assert gone() is None


def test_threads_that_wake_at_once_lose_nobody():
    async def main():
        one, total = waker(), 4000
        events = [asyncio.Event() for _ in range(total)]

        def wake(part):
            for start in range(0, len(part), 7):
                if start % 2:
                    with held_back():
                        for event in part[start : start + 7]:
                            one.set(event)
                else:
                    for event in part[start : start + 7]:
                        one.set(event)

        threads = [in_thread(lambda part=events[number::4]: wake(part)) for number in range(4)]
        await asyncio.wait_for(asyncio.gather(*(event.wait() for event in events)), 30)
        for thread in threads:
            thread.join()

    asyncio.run(main())
