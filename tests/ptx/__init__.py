"""An executor of the PTX that Triton compiles for sm_80, on the CPU, with what a GPU does not report.

    program = parse.parse(text)
    memory = Memory(); memory.add_tensor(x, "x") ...
    machine.run(program, record, memory, seed=0)     # raises machine.Fault

`memory.py` has the tensors of a launch, `parse.py` the text as data, `machine.py` what an instruction does.
"""
