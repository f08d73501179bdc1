"""An executor of the PTX that Triton compiles for sm_80, on the CPU, with the checks that no GPU makes.

    memory = Memory()
    memory.add_tensor(x, "x")
    machine.run(parse.parse(text), record, memory, seed=0)  # raises machine.Fault

`memory.py` has the tensors of a launch and `parse.py` the text as data. `instructions.py` makes a step of
each instruction, most of them by `arithmetic.py`, and `code.py` what runs of the steps. `spaces.py` has the
two kinds of memory, `races.py` what orders accesses of them, and `machine.py` the threads.

Of packages that are published, ptx-parser reads PTX and runs nothing, triton-viz checks bounds in Triton's
interpreter, before there is PTX, and sentryward verifies programs for sm_100.
"""
