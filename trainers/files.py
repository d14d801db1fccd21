"""Files that other tools read, written so that a crash or a full disk never costs the old one."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import platform
import re
import shutil
import stat
import struct
import time
import uuid
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def write_safetensors(path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None):
    """Write atomically. The same tensors and metadata give the same bytes (the library orders metadata by chance)."""
    from safetensors.torch import save

    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    write_bytes_atomically(path, sort_safetensors_metadata(save(tensors, metadata=metadata or {})))


def sort_safetensors_metadata(blob: bytes) -> bytes:
    """A safetensors blob with the keys of its metadata sorted."""
    (length,) = struct.unpack("<Q", blob[:8])
    header = json.loads(blob[8 : 8 + length])
    meta = header.pop("__metadata__", None)
    header = {**({"__metadata__": dict(sorted(meta.items()))} if meta else {}), **header}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + blob[8 + length :]


def write_bytes_atomically(path, blob: bytes):
    """Replace the file in one go: a reader sees the old one or the new one, never half of one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_stale_parts_once(path.parent)
    part = new_part_path(path.parent)
    try:
        with open(part, "wb") as file:
            file.write(blob)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise OSError(error.errno, describe_failed_write(path, len(blob), error)) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def describe_failed_write(path: Path, size: int, error: OSError) -> str:
    """What could not be written, why, and what to do about that reason."""
    if error.errno in (errno.ENAMETOOLONG, errno.EINVAL):
        return f"{path} could not be written ({error.strerror}): the name is not possible here. Choose a shorter one."
    free = shutil.disk_usage(path.parent).free / 2**20
    return (
        f"{path} could not be written ({error.strerror}): {size / 2**20:.1f} MiB are needed and {free:.1f} MiB are "
        "free. An older file of that name is untouched. Free some space and press Run again; the run continues where "
        "it was saved."
    )


# -- half-written files ------------------------------------------------------------------------------------------------

MACHINE = f"{zlib.crc32(platform.node().encode()):08x}"
PROCESS = uuid.uuid4().hex[:8]  # process ids come again, in containers at every start
PART_NUMBERS = itertools.count()
PART_PATTERN = re.compile(r"\.([0-9a-f]{8})-([0-9a-f]{8})-\d+\.(\d+)\.part")
STALE_PART_SECONDS = 3600.0  # of parts whose owner cannot be asked: on another machine, or of the first releases
SWEPT_FOLDERS: set[Path] = set()


def new_part_path(folder: Path) -> Path:
    """Where something is written before it gets its name: one place for each writer, and never a long name."""
    return folder / f".{MACHINE}-{PROCESS}-{next(PART_NUMBERS)}.{os.getpid()}.part"


def remove_stale_parts_once(folder: Path) -> None:
    """`remove_stale_parts`, when this process has not been in the folder before."""
    if folder not in SWEPT_FOLDERS:
        SWEPT_FOLDERS.add(folder)
        remove_stale_parts(folder)


def remove_stale_parts(folder: Path) -> None:
    """Remove what a dead process left half written; what others are writing stays."""
    for part in folder.glob(".*.part"):
        with contextlib.suppress(OSError):
            if is_stale_part(part):
                shutil.rmtree(part) if part.is_dir() and not part.is_symlink() else part.unlink()


def is_stale_part(part: Path) -> bool:
    known = PART_PATTERN.fullmatch(part.name)
    if known and known[1] == MACHINE:
        return known[2] != PROCESS and (int(known[3]) == os.getpid() or not is_process_alive(int(known[3])))
    is_old = time.time() - part.stat().st_mtime > STALE_PART_SECONDS
    return is_old and (known is not None or part.is_file())  # a folder without our mark may be someone's download


def is_process_alive(process_id: int) -> bool:
    """Whether it runs on this machine; True where that cannot be known."""
    if os.name != "posix":  # there os.kill ends the process
        return True
    try:
        os.kill(process_id, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


# -- JSON -------------------------------------------------------------------------------------------------------------

MAX_JSON_BYTES = 64 * 2**20


def read_json_object(path: Path) -> dict:
    """The object in a JSON file. Raises ValueError, with the reason in words, for everything else."""
    try:
        text = read_regular_file(path).decode("utf-8")
    except FileNotFoundError as error:
        raise ValueError(f"{path.name} is missing") from error
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is no UTF-8 text") from error
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{path.name} is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{path.name} is cut off or is no JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} holds no JSON object")
    return value


def read_regular_file(path: Path) -> bytes:
    """The bytes of a file that is neither a named pipe, which would be waited for, nor too large for what it is.
    Raises ValueError for such."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            raise ValueError(f"{path.name} is no regular file")
        if about.st_size > MAX_JSON_BYTES:
            raise ValueError(
                f"{path.name} has {about.st_size / 2**20:.0f} MiB, which is too much for what it should be"
            )
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


# -- safetensors -------------------------------------------------------------------------------------------------------


MAX_LORA_TENSORS = 50_000  # ten times the largest


def read_safetensors(path, most: int | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata). Raises ValueError for a file that is no safetensors file, or holds more than `most` tensors,
    each of which costs time. The tensors are copies: mapped
    ones would change with their file, and Windows would not let it be replaced."""
    from safetensors import SafetensorError, safe_open

    if Path(path).exists() and not Path(path).is_file():  # opening a named pipe would wait for ever
        raise ValueError(f"{path} is not a readable safetensors file: it is no regular file")
    try:
        with safe_open(str(path), framework="pt") as file:
            if most is not None and len(file.keys()) > most:
                raise ValueError(
                    f"{path} holds {len(file.keys())} tensors, and at most {most} are read. Is it the right file?"
                )
            return {key: file.get_tensor(key).clone() for key in file.keys()}, file.metadata() or {}
    except (SafetensorError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error


# -- trees: nested states of optimizers and methods as one safetensors file --------------------------------------------

TREE_KEY, CHECKSUM_KEY = "tree", "blake3"  # all metadata of a state tree, so that a damaged key is seen too


def write_state_tree(path, tree):
    """Write nested dicts, lists, tuples, numbers, strings and tensors as one safetensors file, exactly, with a checksum
    of all of it."""
    tensors: dict[str, Tensor] = {}
    text = json.dumps(pack_state_tree(tree, tensors))
    write_safetensors(path, tensors, {TREE_KEY: text, CHECKSUM_KEY: hash_state_tree(text, tensors)})


def read_state_tree(path) -> Any:
    """What `write_state_tree` wrote, equal in every bit. Raises ValueError for a file that is none, or whose content
    is not what was written; files of the first releases have no checksum and are read as they are."""
    tensors, metadata = read_safetensors(path)
    if TREE_KEY not in metadata:
        raise ValueError(f"{path} is not a saved state")
    written = {key: value for key, value in metadata.items() if key != TREE_KEY}
    if written and written != {CHECKSUM_KEY: hash_state_tree(metadata[TREE_KEY], tensors)}:
        raise ValueError(f"{path} is damaged: its content is not what was written (the checksum differs)")
    try:
        return unpack_state_tree(json.loads(metadata[TREE_KEY]), tensors)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def hash_state_tree(text: str, tensors: dict[str, Tensor]) -> str:
    """blake3 over the tree's text and every tensor's name, type, shape and values (some GB a second on one core)."""
    from blake3 import blake3

    digest = blake3(text.encode())
    for key in sorted(tensors):
        tensor = tensors[key].detach().cpu().contiguous()
        digest.update(f"\n{key} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def pack_state_tree(tree, tensors):
    if isinstance(tree, Tensor):
        key = str(len(tensors))
        tensors[key] = tree.detach().cpu().clone()
        return {"tensor": key}
    if isinstance(tree, dict):
        return {"dict": [[pack_state_tree(k, tensors), pack_state_tree(v, tensors)] for k, v in tree.items()]}
    if isinstance(tree, tuple):
        return {"tuple": [pack_state_tree(v, tensors) for v in tree]}
    if isinstance(tree, list):
        return [pack_state_tree(v, tensors) for v in tree]
    return tree


def unpack_state_tree(shape, tensors) -> Any:
    """The tree that was packed. Raises ValueError for what `pack_state_tree` never makes."""
    try:
        return unpack_state_node(shape, tensors)
    except (KeyError, TypeError) as error:
        raise ValueError(f"it holds no state tree ({type(error).__name__}: {error})") from error


def unpack_state_node(shape, tensors) -> Any:
    if isinstance(shape, list):
        return [unpack_state_node(v, tensors) for v in shape]
    if not isinstance(shape, dict):
        return shape
    ((kind, value),) = shape.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "tuple":
        return tuple(unpack_state_node(v, tensors) for v in value)
    if kind != "dict":
        raise ValueError(f"it holds no state tree ({kind!r})")
    return {unpack_state_node(k, tensors): unpack_state_node(v, tensors) for k, v in value}


# -- checksums of files that other tools read -------------------------------------------------------------------------

HASH_KEY = "modelspec.hash_sha256"  # of the values
METADATA_HASH_KEY, METADATA_HASH_MARK = "trainyard.metadata_hash", "sha256 of the metadata: "
ALTERED_METADATA = (
    f"the metadata is not what was saved ({METADATA_HASH_KEY} differs): the file is damaged, or another program "
    "changed it"
)


def tensor_hash(tensors: dict[str, Tensor]) -> str:
    """sha256 over names and values: what modelspec.hash_sha256 holds."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(key.encode())
        digest.update(tensors[key].detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def seal_metadata(metadata: dict[str, str], tensors: dict[str, Tensor]) -> dict[str, str]:
    """The metadata with a checksum of it and of the tensors' types and shapes; HASH_KEY holds that of their values."""
    return {**metadata, METADATA_HASH_KEY: hash_metadata(metadata, tensors)}


def is_metadata_altered(metadata: dict[str, str], tensors: dict[str, Tensor]) -> bool:
    """Whether it is not what `seal_metadata` gave. False for files without the checksum, of other tools and of the
    first releases. The checksum is known by its key and by its beginning, of which one flipped bit leaves one whole."""
    sealed = any(key == METADATA_HASH_KEY or text.startswith(METADATA_HASH_MARK) for key, text in metadata.items())
    return sealed and metadata.get(METADATA_HASH_KEY) != hash_metadata(metadata, tensors)


def hash_metadata(metadata: dict[str, str], tensors: dict[str, Tensor]) -> str:
    rest = {key: text for key, text in metadata.items() if key != METADATA_HASH_KEY}
    kinds = {key: f"{tensor.dtype} {list(tensor.shape)}" for key, tensor in tensors.items()}
    text = json.dumps([rest, kinds], sort_keys=True)
    return f"{METADATA_HASH_MARK}{hashlib.sha256(text.encode()).hexdigest()}"


# -- LoRA files --------------------------------------------------------------------------------------------------------


TRAINING_COMMENT = "trained by Trainyard"


class LoraFile(dict):
    """A LORA_MODEL: tensors by key, as ComfyUI's own nodes expect, with the metadata of its file and the steps it was
    trained. damage: what is to be told of a file whose metadata is not what was saved."""

    def __init__(self, tensors, metadata=None, steps=0, damage=""):
        super().__init__(require_tensors(tensors))
        self.metadata, self.steps = {str(k): as_metadata_text(v) for k, v in dict(metadata or {}).items()}, steps
        self.damage = damage


def as_lora_file(lora) -> LoraFile:
    """The LORA_MODEL of any node. Raises ValueError for what is none."""
    if isinstance(lora, LoraFile):
        return lora
    if isinstance(lora, dict) and len(lora) > MAX_LORA_TENSORS:
        raise ValueError(
            f"lora holds {len(lora)} tensors, and at most {MAX_LORA_TENSORS} are read. Is it the right file?"
        )
    return LoraFile(lora)


def require_tensors(lora) -> dict[str, Tensor]:
    """The LORA_MODEL itself. Raises ValueError unless it is tensors by key."""
    if not isinstance(lora, dict):
        raise ValueError(f"lora is a {type(lora).__name__}; connect a LORA_MODEL, which holds tensors by name.")
    for key, value in lora.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"lora holds {str(value)[:40]!r} ({type(value).__name__}) under {str(key)[:60]!r} and no tensor. "
                "Connect a LORA_MODEL of a Train node or of Load LoRA File."
            )
    return lora


def as_metadata_text(value) -> str:
    """A value as safetensors metadata holds it: text, or JSON of anything else."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def lora_metadata(
    *, title, base, architecture, prediction, adapter, optimizing, noise, run, resolution, dataset, steps
) -> dict[str, str]:
    """What kohya's tools (ss_*), the modelspec readers and the next trainer look for. No clock time: the same run, the
    same bytes."""
    ss = {
        "ss_network_module": "networks.lora" if adapter.algorithm == "LoRA" else "lycoris.kohya",
        "ss_network_dim": adapter.rank,
        "ss_network_alpha": adapter.alpha or adapter.rank,
        "ss_network_args": json.dumps(kohya_network_args(adapter)),
        "ss_base_model_version": base,
        "ss_v2": "True" if base.startswith("sd_v2") else "False",
        "ss_learning_rate": run.learning_rate,
        "ss_unet_lr": run.learning_rate,
        "ss_text_encoder_lr": (optimizing.text_encoder_lr or run.learning_rate / 10) if adapter.text_encoder else 0,
        "ss_optimizer": optimizing.optimizer,
        "ss_lr_scheduler": optimizing.schedule,
        "ss_lr_warmup_steps": optimizing.warmup,
        "ss_max_train_steps": run.steps,
        "ss_steps": steps,
        "ss_batch_size_per_device": run.batch,
        "ss_gradient_accumulation_steps": optimizing.accumulate,
        "ss_max_grad_norm": optimizing.clip,
        "ss_seed": run.seed,
        "ss_min_snr_gamma": noise.gamma if noise.weighting == "min-SNR" else "None",
        "ss_num_train_images": dataset.get("images", 0),
        "ss_resolution": resolution,
        "ss_output_name": title,
        "ss_caption_dropout_rate": dataset.get("dropout", 0.0),
        "ss_training_comment": TRAINING_COMMENT,
    }
    spec = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": title,
        "modelspec.resolution": resolution,
        "modelspec.prediction_type": prediction,
    }
    own = {
        "trainyard": json.dumps(
            {r.__class__.__name__: r.to_dict() for r in (adapter, optimizing, noise, run)}, sort_keys=True
        )
    }
    return {k: str(v) for k, v in {**ss, **spec, **own}.items()}


def kohya_network_args(adapter) -> dict:
    """What kohya's tools call the arguments of the network, in LyCORIS's words where they go beyond LoRA."""
    conv = (
        {"conv_dim": adapter.conv_rank, "conv_alpha": adapter.conv_alpha or adapter.conv_rank} if adapter.conv else {}
    )
    kinds = {
        "DoRA": {"algo": "locon", "dora_wd": True},
        "LoHa": {"algo": "loha"},
        "LoKr": {"algo": "lokr", "factor": adapter.factor},
    }
    return conv | kinds.get(adapter.algorithm, {})


def write_lora(path, lora: LoraFile, extra: dict[str, str] | None = None):
    """Write a LORA_MODEL with its metadata. Raises ValueError rather than keep NaN, or a file that would change
    nothing."""
    lora = as_lora_file(lora)
    if not lora:
        raise ValueError(
            "This LoRA is empty: no layer has learnt anything yet. Train for at least one step with a learning rate "
            "above 0."
        )
    bad = [key for key, value in lora.items() if not torch.isfinite(value).all()]
    if bad:
        raise ValueError(
            f"This LoRA holds NaN or infinite values ({len(bad)} tensors, first {bad[0]}); it is not saved. Lower the "
            "learning rate."
        )
    metadata = {**lora.metadata, HASH_KEY: f"0x{tensor_hash(lora)}", **(extra or {})}
    write_safetensors(path, lora, seal_metadata(metadata, lora))


def read_lora(path) -> LoraFile:
    """A LoRA file of any tool. Raises ValueError when it is no safetensors file, when it holds more tensors than any
    LoRA, or when it is one of ours whose values are not those that were written. Metadata that is not what was written
    changes no picture, and programs that edit or resize LoRAs change it on purpose: it is told in `damage`."""
    tensors, metadata = read_safetensors(path, most=MAX_LORA_TENSORS)
    written = metadata.get(HASH_KEY)
    ours = metadata.get("ss_training_comment") == TRAINING_COMMENT  # others hash other things under that key
    if ours and written is not None and written != f"0x{tensor_hash(tensors)}":
        raise ValueError(
            f"{path} is damaged: its values are not those that were saved ({HASH_KEY} differs). Take an earlier "
            f"file of the run, or a copy. If another program changed it on purpose, remove {HASH_KEY} from its "
            "metadata."
        )
    steps = metadata.get("ss_steps", "")
    damage = f"{path}: {ALTERED_METADATA}" if is_metadata_altered(metadata, tensors) else ""
    return LoraFile(tensors, metadata, int(steps) if steps.isdecimal() else 0, damage)


def rescale_lora(lora: LoraFile, factor: float, notes: dict[str, str]) -> LoraFile:
    """The LoRA whose strength 1 is what its strength `factor` was: alpha is scaled, or the upper matrix where a file
    has no alpha. Raises ValueError for a factor that would leave nothing, or adapters whose effect is not proportional
    to their strength."""
    if not factor or not math.isfinite(factor):
        raise ValueError(f"A LoRA cannot be rescaled by {factor}.")
    if odd := sorted(key for key in lora if key.endswith((".dora_scale", ".diff", ".w_norm", ".b_norm"))):
        raise ValueError(f"{odd[0]} is not proportional to strength; only LoRA, LoHa and LoKr files can be rescaled.")
    whole = {key.removesuffix(".lokr_w2") for key in lora if key.endswith(".lokr_w2")} & {
        key.removesuffix(".lokr_w1") for key in lora if key.endswith(".lokr_w1")
    }  # loaders read no alpha of these
    bases = {key.removesuffix(".alpha") for key in lora if key.endswith(".alpha")} - whole
    up = ("lora_up.weight", "lora_B.weight", "hada_w1_a", "lokr_w1", "lokr_w1_a")
    has_alpha = lambda key: any(key[:dot] in bases for dot, letter in enumerate(key) if letter == ".")
    is_read = lambda key: key.endswith(".alpha") and key.removesuffix(".alpha") not in whole
    scales = lambda key: is_read(key) or (key.endswith(up) and not has_alpha(key))
    return LoraFile(
        {k: v * factor if scales(k) else v for k, v in lora.items()},
        {**getattr(lora, "metadata", {}), **notes},
        getattr(lora, "steps", 0),
    )
