"""`import prunekit` makes transformers load our models, whichever of the two comes first, and itself loads neither."""

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from prunekit.models import classes
from prunekit.testing.models import COMMON, SIZES

classes.register()

FAKE = {  # a package as large as the question needs
    "__init__.py": "",
    "models/__init__.py": "",
    "models/auto/__init__.py": "",
    "models/auto/configuration_auto.py": "",
    "models/other.py": "import transformers.models.auto.configuration_auto\nassert not said\n",
    "models/broken.py": "import transformers.models.auto.configuration_auto\nraise ImportError('broken')\n",
}
OURS = "import prunekit.models.registration as ours; import builtins; builtins.said = said = []\n"
COUNTED = f"{OURS}ours.register = lambda: said.append(1)\n"


def python(code: str, *path: Path) -> None:
    """Run it in a process of its own."""
    code = "".join(f"import sys; sys.path.insert(0, {str(place)!r})\n" for place in path) + code
    done = subprocess.run([sys.executable, "-W", "error::ImportWarning", "-c", code], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-3000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose layers differ in size."""
    values, family = COMMON | SIZES["llama"] | {"head_dim": 4}, classes.FAMILIES["llama"]
    layers = {1: {family.width: 5, "num_attention_heads": 3}, 2: {"skip": ["mlp"]}}
    config = AutoConfig.for_model("prunekit_llama", **values, per_layer_config=layers)
    path = tmp_path_factory.mktemp("unequal")
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a package `transformers` lies that takes no time to import."""
    root = tmp_path_factory.mktemp("fake")
    for name, text in FAKE.items():
        file = root / "transformers" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


@pytest.mark.parametrize(
    "first",
    [
        pytest.param(
            "import transformers; transformers.AutoConfig; import prunekit", id="transformers", marks=pytest.mark.slow
        ),
        pytest.param("import prunekit, transformers", id="prunekit", marks=pytest.mark.slow),
        pytest.param("import prunekit; from transformers import AutoTokenizer", id="tokenizer", marks=pytest.mark.slow),
        pytest.param("import prunekit; from transformers import LlamaForCausalLM", id="llama", marks=pytest.mark.slow),
        pytest.param(
            "import prunekit; import transformers.models.llama.modeling_llama", id="modeling", marks=pytest.mark.slow
        ),
        pytest.param("from prunekit.models.classes import PrunekitLlamaForCausalLM", id="classes"),
        pytest.param(
            "import prunekit, importlib.util; importlib.util.find_spec('transformers.models.auto')",
            id="looked-up",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_model_of_unequal_layers_loads_in_any_order_of_imports(first: str, folder: Path) -> None:
    python(
        f"{first}\nimport inspect, transformers\n"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r})\n"
        "assert type(model).__name__ == 'PrunekitLlamaForCausalLM', type(model)\n"
        "assert 'class LlamaAttention' in inspect.getsource(type(model.model.layers[0].self_attn))\n"
        "assert not any('prunekit' in type(finder).__module__ for finder in __import__('sys').meta_path)\n"
    )


def test_importing_prunekit_loads_neither_torch_nor_transformers() -> None:
    heavy = ("torch", "transformers", "numpy", "pydantic")
    python(f"import sys, prunekit\nassert not [name for name in {heavy} if name in sys.modules], sys.modules.keys()")


def test_classes_are_registered_once_and_not_in_the_middle_of_an_import(fake: Path) -> None:
    python(f"{COUNTED}import transformers\nassert not said\nimport transformers.models.other\nassert said == [1]", fake)
    again = "import importlib, prunekit\nimportlib.reload(transformers); importlib.reload(prunekit)\n"
    python(f"{COUNTED}import transformers.models.auto.configuration_auto\n{again}assert said == [1, 1]", fake)


def test_an_import_that_fails_is_over_as_well(fake: Path) -> None:
    python(f"{COUNTED}try:\n    import transformers.models.broken\nexcept ImportError:\n    pass\nassert said", fake)
    python(f"{COUNTED}try:\n    import transformers.gone\nexcept ImportError:\n    pass\nassert not said", fake)


def test_a_registration_that_fails_is_tried_again(fake: Path) -> None:
    failing = "def fail(): said.append(1); raise ImportError('no torch')\nours.register = fail\n"
    asked = "try:\n    import transformers.models.{}\nexcept ImportError as error:\n    assert 'torch' in str(error)\n"
    python(f"{OURS}{failing}{asked.format('other')}{asked.format('other')}assert len(said) > 1", fake)


def test_without_transformers_its_absence_is_all_that_is_said() -> None:
    nowhere = "import sys\nsys.path[:] = [p for p in sys.path if 'site-packages' not in p]\n"
    asked = "try:\n    import transformers\nexcept ImportError as error:\n    assert str(error) == "
    python(f"import prunekit\n{nowhere}{asked}\"No module named 'transformers'\"\nelse:\n    raise SystemExit(1)")


def test_loaders_and_finders_of_others_are_left_as_they_are(fake: Path) -> None:
    """What a frozen application brings: finders in front and behind, loaders that lack what ours may ask."""
    python(
        f"{COUNTED}import importlib.machinery, importlib.util, sys\n"
        "class Old:  # a loader of before PEP 451\n"
        "    def load_module(self, name):\n"
        "        sys.modules[name] = module = importlib.util.module_from_spec(\n"
        "            importlib.machinery.ModuleSpec(name, None))\n"
        "        return module\n"
        "class Frozen:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'transformers.old':\n"
        "            return importlib.machinery.ModuleSpec(name, Old())\n"
        "sys.meta_path.insert(1, Frozen()); sys.meta_path.insert(1, object())\n"
        "found = importlib.util.find_spec('transformers.models.auto')\n"
        "assert found.loader.is_package('transformers.models.auto')\n"
        "assert found.loader.get_data(found.origin) == b''\n"
        "import warnings; warnings.simplefilter('ignore')\n"
        "import transformers.old, transformers.models.other\n"
        "assert isinstance(transformers.old.__spec__.loader, (Old, type(None)))\n"
        "other = transformers.models.other\n"
        "assert type(other.__loader__) is importlib.machinery.SourceFileLoader is type(other.__spec__.loader)\n"
        "assert said == [1]",
        fake,
    )
