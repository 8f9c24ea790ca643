"""The ways to start a job: on this machine, under torchrun, on Ray, through SLURM; and what is looked at before."""
