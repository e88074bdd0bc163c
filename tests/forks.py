"""A process with transformers loaded, which takes 5 s, that runs scripts in forks of itself, one after the other.

A fork knows as little of prunekit as a fresh process. `Forks` of conftest.py asks, with one JSON object a line on
standard input, and reads a line with the exit code.
"""

import gc
import json
import os
import runpy
import sys
import tempfile
import traceback

from transformers import LlamaForCausalLM, conversion_mapping, dynamic_module_utils  # noqa: F401  what scripts load

conversion_mapping.get_checkpoint_conversion_mapping("llama")  # made once
gc.freeze()

for line in sys.stdin:
    read, write = os.pipe()  # the standard input of a script: nothing comes, and it ends with this process
    if child := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.close(read)
        os.close(write)
        print(code, flush=True)
        continue
    os.close(write)
    asked = json.loads(line)
    for descriptor, file in enumerate((read, *(os.open(name, os.O_WRONLY | os.O_CREAT) for name in asked["streams"]))):
        os.dup2(file, descriptor)
    os.chdir(asked["cwd"])
    os.environ.update(asked["env"])
    tempfile.tempdir = None  # this and the next were read when all was imported
    if "HF_MODULES_CACHE" in os.environ:
        dynamic_module_utils.HF_MODULES_CACHE = os.environ["HF_MODULES_CACHE"]  # type: ignore[misc]
    sys.argv = asked["argv"]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        print(ended.code if code else "", file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)  # to take down what the forks share takes a second
