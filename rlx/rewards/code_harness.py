"""Runs a program, then a test in its names, and proves that the test ran to its end: ``python -I code_harness.py FD``.

The socket FD brings a word that asks for more, and, once the program's own text has ended, the test and a proof that goes
back when the test has ended. So whoever leaves early (sys.exit, os._exit, an exception, a signal) never gives the proof; what
is registered for the exit is not run before it, and writing to every open descriptor does not give it. A program that takes
this very process apart can still find it: keeping that out is a sandbox's work. Imports nothing of rlx, nor what takes time.
"""

import builtins
import os
import sys
import types

WORD_BYTES = 16
LENGTH_BYTES = 8


def main() -> None:
    # What the program may replace is taken before it runs.
    leave, read, write, build, run = os._exit, os.read, os.write, builtins.compile, builtins.exec
    channel = int(sys.argv[1])
    word = read(channel, WORD_BYTES)
    sys.argv = ["program.py"]
    with open(sys.argv[0], encoding="utf-8") as file:
        program = file.read()
    module = types.ModuleType("__main__")
    module.__dict__["__file__"] = sys.argv[0]
    sys.modules["__main__"] = module
    run(build(program, sys.argv[0], "exec", dont_inherit=True), module.__dict__)
    write(channel, word)
    left, message = int.from_bytes(read(channel, LENGTH_BYTES), "big"), b""
    while left and (more := read(channel, left)):
        left, message = left - len(more), message + more
    proof = message[-WORD_BYTES:]
    run(build(message[:-WORD_BYTES], "test.py", "exec", dont_inherit=True), module.__dict__)
    write(channel, proof)
    leave(0)


if __name__ == "__main__":
    main()
