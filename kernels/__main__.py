"""`python -m darts_fast.kernels` prints which backends this machine has and what each is used for."""

from darts_fast.kernels.backends import available

for name, reason in available().items():
    print(f"{name:<8}{reason}")
