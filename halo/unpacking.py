"""A .gguf teacher as safetensors: converting one takes many seconds, and a run loads its teacher several times."""

from pathlib import Path

import torch

from halo import files, teachers

SOURCE = "source.json"


def unpacked(name: str, folder: Path) -> str:
    """Return the name to load a teacher by: of a .gguf file, a folder that it is converted into once.

    The folder holds the file's weights in float32, which every quantised value is exact in, and its tokenizer.

    Args:
        name: As for `teachers.locate`.
        folder: Where to convert it to. A folder that was made from other weights is replaced.

    Returns:
        The folder, or the name itself if it is not that of a .gguf file.

    Raises:
        HaloError: If it cannot be loaded or written.
    """
    if teachers.locate(name).gguf_file is None:
        return name
    source = {"teacher": name, "fingerprint": teachers.fingerprint(name)}
    if (folder / SOURCE).is_file() and files.read_json(folder / SOURCE, f"delete {folder}") == source:
        return str(folder)
    tokenizer = teachers.load_tokenizer(name)
    teacher = teachers.load_teacher(name, torch.device("cpu"))

    def write(partial: Path) -> None:
        teacher.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        files.write_json(partial / SOURCE, source)

    files.write_directory(folder, write)
    return str(folder)
