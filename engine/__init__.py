"""The loop: client and child process, scheduler, sequences, sampler, detokeniser; no HTTP, no file format."""
