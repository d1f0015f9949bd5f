"""One slice in a process of its own, which a kernel that goes wrong may take with it.

`python -m bench.gpu.one NAME`, as bench.gpu starts it. Its rows go to standard output, a line of JSON each, and
whatever else is printed to standard error.
"""

import importlib
import json
import os
import sys
import traceback


def main() -> int:
    name, is_smoke = sys.argv[1], "--smoke" in sys.argv
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)

        def put(row: dict[str, object]) -> None:
            out.write(json.dumps(row) + "\n")
            out.flush()

        if is_smoke:
            os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        try:
            import torch

            from bench.gpu.run import Run

            run = Run(torch.device("cpu" if is_smoke else "cuda"), is_smoke)
            put({"device": run.describe()})
            for row in importlib.import_module(f"bench.gpu.{name}").rows(run):
                put(row)
        except Exception as error:  # told in the results, beside those of the other slices
            traceback.print_exc()
            put({"failed": f"{type(error).__name__}: {str(error).partition(os.linesep)[0][:300]}", "holds": False})
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
