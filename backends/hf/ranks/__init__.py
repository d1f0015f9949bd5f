"""A model in several processes, its ranks: how they are started, told what to do, and gather what each computes."""
