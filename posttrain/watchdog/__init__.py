"""When a rank dies, hangs or fails, the others stop, and one message names rank, phase and step.

Every rank publishes its place (:mod:`posttrain.watchdog.phases`) each second in the key-value store of its
launcher (``MASTER_ADDR:MASTER_PORT``), over a connection of its own and never through a collective, which
could hang. Every rank judges all of them (:mod:`posttrain.watchdog.judging`):

- **gone**: the process has ended without a word. On the same machine that is seen at once.
- **silent**: nothing was heard of it for ``silence`` seconds: its machine or network is down, or something
  holds the whole process (a stop signal, native code that keeps the interpreter).
- **hung**: it is alive, but stays in one phase for longer than the limit of that phase while others wait for
  it. A rank waits when it is ahead, or inside a collective while another at the same place is not. A phase
  that is slow in this run may go on being so: the limit is at least three times the longest that a rank has
  worked in it.
- **failed**: it raised; its error is passed on, instead of the broken connection that the others see.
- **deadlock**: all wait in collectives, and nothing has moved for ``collective`` seconds.

Then stacks are written into ``watchdog/`` of the run directory, the message is printed once per machine, and
every process ends with exit code 1: by an exception in the main thread where that is possible, without one
where it is stuck. A checkpoint is complete or not there (:mod:`posttrain.checkpointing.resume`), so the
newest one is where to go on. In a single process nothing is stopped: a phase beyond its limit is named once,
with the stack.
"""

from posttrain.watchdog.judging import Limits
from posttrain.watchdog.phases import beat
from posttrain.watchdog.watch import RankFailure, watching

__all__ = ["Limits", "RankFailure", "beat", "watching"]
