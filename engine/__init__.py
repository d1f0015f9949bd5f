"""The loop: client and child process, scheduler, sequences, sampler, detokenizer; no HTTP, no file format."""
