"""Import every module of the package: run where only the core dependencies are installed."""

import importlib
import importlib.util
import pkgutil
import sys

import kvilt

OPTIONAL = ("matplotlib", "peft", "accelerate", "datasets", "rouge_score", "llmlingua")

OTHERS = [f"kvilt.integrations.vllm.{name}" for name in ("connector", "scheduler", "endpoints")]
OTHERS += ["kvilt.integrations.langchain", "kvilt.integrations.llama_index"]  # classes of other packages, made more of
NEEDS_SERVE = ("wire", "replies", "metrics", "asking", "library", "door", "routes", "app")
OTHERS += [f"kvilt.serve.{name}" for name in NEEDS_SERVE]

names = [m.name for m in pkgutil.walk_packages(kvilt.__path__, "kvilt.") if m.name not in OTHERS]
for name in names:
    importlib.import_module(name)
present = [p for p in OPTIONAL if importlib.util.find_spec(p)]
if present:
    sys.exit(f"optional packages are installed here, so this proves nothing: {', '.join(present)}")
print(f"{len(names)} modules imported with the core dependencies alone")
