"""How a person names a genotype: written out, by the name of a published one, or by a file that holds one."""

import os
import re
from pathlib import Path
from typing import Any, NoReturn

from darts_fast.errors import InputError
from darts_fast.files import Unreadable, read_file, read_json
from darts_fast.genotype import Genotype, Item, assemble, shown, suggestion

LONGEST_TEXT = 100_000  # characters; a genotype of four nodes has some 600
LARGEST_LOG = 2**26  # bytes

TOKEN = re.compile(
    r"""(?P<word>[A-Za-z_][A-Za-z_0-9]*) | (?P<number>-?[0-9]{1,9}(?![0-9])) | (?P<mark>[\[\](),=])
    | (?P<text>'[^'\n]*'|"[^"\n]*") | (?P<end>\Z)""",
    re.VERBOSE,
)
SPACE = re.compile(r"\s*")
CLOSING = {"[": "]", "(": ")"}


def parse(text: str, place: str = "genotype") -> Genotype:
    """The genotype that `text` writes out, nested or flat (official code: two pairs a node, one list):

        Genotype(normal=[[('sep_conv_3x3', 0), ...], ...], normal_concat=range(2, 6), reduce=[...], ...)
        Genotype(normal=[('sep_conv_3x3', 0), ...], normal_concat=[2, 3, 4, 5], reduce=[...], ...)

    A grammar of its own reads it: nothing is evaluated. Lists may be tuples, quotes single or double, spaces
    and line breaks anywhere. `place` begins the sentence about an error.

    Raises:
        InputError: it is not that. Says at which character, and what was expected there.
    """
    if len(text) > LONGEST_TEXT:
        raise InputError(
            f"{place} has {len(text):,} characters, more than the {LONGEST_TEXT:,} that are read"
        )
    parser = _Parser(text, 0, place)
    genotype = parser.genotype()
    parser.advance()
    if parser.token:
        parser.fail("nothing more")
    return genotype


class _Parser:
    """Recursive descent over `text` from `start`; `token` is the next one and "" the end of the text."""

    def __init__(self, text: str, start: int, place: str):
        self.text, self.end, self.source = text, start, place
        self.advance()

    def genotype(self) -> Genotype:
        """Ends on its closing bracket: what follows in a log need not be made of tokens."""
        self.expect("Genotype")
        self.expect("(")
        fields: dict[str, Item] = {}
        for field in Genotype._fields:
            if fields:
                self.expect(",")
            self.expect(field)
            self.expect("=")
            fields[field] = self.value(depth=0)
        if self.token == ",":
            self.advance()
        if self.token != ")":
            self.fail("')'")
        return assemble(fields)

    def value(self, depth: int) -> Item:
        """Text, a whole number, range(a, b), or values in brackets."""
        kind, token, place = self.kind, self.token, self.place()
        if kind in ("text", "number"):
            self.advance()
            return Item(token[1:-1] if kind == "text" else int(token), place)
        if token == "range":
            self.advance()
            self.expect("(")
            first = self.number()
            self.expect(",")
            end = self.number()
            self.expect(")")
            return Item(range(first, end), place)
        if token not in CLOSING:
            self.fail("a value" if depth else "a list")
        if depth == 3:  # list of nodes, node, pair
            self.fail("nothing nested deeper than a pair")
        self.advance()
        parts = []
        while self.token != CLOSING[token]:
            parts.append(self.value(depth + 1))
            if self.token == ",":
                self.advance()
            elif self.token != CLOSING[token]:
                self.fail(f"',' or {CLOSING[token]!r}")
        self.advance()
        return Item(parts, place)

    def number(self) -> int:
        if self.kind != "number":
            self.fail("a whole number")
        number = int(self.token)
        self.advance()
        return number

    def expect(self, token: str) -> None:
        if self.token != token:
            self.fail(repr(token))
        self.advance()

    def advance(self) -> None:
        self.start = SPACE.match(self.text, self.end).end()  # type: ignore[union-attr]  # also no space is
        match = TOKEN.match(self.text, self.start)
        if match is None:
            found = re.compile(r"-?[0-9]+|.", re.DOTALL).match(self.text, self.start)[0]  # type: ignore[index]
            reason = "is a number too large" if len(found) > 1 else "begins nothing that belongs here"
            if found in "'\"":
                reason = "opens a quotation that is not closed"
            raise InputError(f"{self.place()}: {shown(found)} {reason}")
        self.kind, self.token, self.end = match.lastgroup, match[0], match.end()

    def fail(self, expected: str) -> NoReturn:
        found = shown(self.token) if self.token else "the end"
        raise InputError(f"{self.place()}: expected {expected}, found {found}")

    def place(self) -> str:
        return f"{self.source}, character {self.start + 1}"


# The published genotypes, as the code of their papers writes them: quark0/darts, yuhuixu1993/PC-DARTS and
# chenxin061/pdarts.
_PUBLISHED = {
    "NASNet": """Genotype(
        normal=[
            ('sep_conv_5x5', 1), ('sep_conv_3x3', 0), ('sep_conv_5x5', 0), ('sep_conv_3x3', 0),
            ('avg_pool_3x3', 1), ('skip_connect', 0), ('avg_pool_3x3', 0), ('avg_pool_3x3', 0),
            ('sep_conv_3x3', 1), ('skip_connect', 1)],
        normal_concat=[2, 3, 4, 5, 6],
        reduce=[
            ('sep_conv_5x5', 1), ('sep_conv_7x7', 0), ('max_pool_3x3', 1), ('sep_conv_7x7', 0),
            ('avg_pool_3x3', 1), ('sep_conv_5x5', 0), ('skip_connect', 3), ('avg_pool_3x3', 2),
            ('sep_conv_3x3', 2), ('max_pool_3x3', 1)],
        reduce_concat=[4, 5, 6],
    )""",
    "AmoebaNet": """Genotype(
        normal=[
            ('avg_pool_3x3', 0), ('max_pool_3x3', 1), ('sep_conv_3x3', 0), ('sep_conv_5x5', 2),
            ('sep_conv_3x3', 0), ('avg_pool_3x3', 3), ('sep_conv_3x3', 1), ('skip_connect', 1),
            ('skip_connect', 0), ('avg_pool_3x3', 1)],
        normal_concat=[4, 5, 6],
        reduce=[
            ('avg_pool_3x3', 0), ('sep_conv_3x3', 1), ('max_pool_3x3', 0), ('sep_conv_7x7', 2),
            ('sep_conv_7x7', 0), ('avg_pool_3x3', 1), ('max_pool_3x3', 0), ('max_pool_3x3', 1),
            ('conv_7x1_1x7', 0), ('sep_conv_3x3', 5)],
        reduce_concat=[3, 4, 6],
    )""",
    "DARTS_V1": """Genotype(
        normal=[
            ('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('skip_connect', 0), ('sep_conv_3x3', 1),
            ('skip_connect', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('skip_connect', 2)],
        normal_concat=[2, 3, 4, 5],
        reduce=[
            ('max_pool_3x3', 0), ('max_pool_3x3', 1), ('skip_connect', 2), ('max_pool_3x3', 0),
            ('max_pool_3x3', 0), ('skip_connect', 2), ('skip_connect', 2), ('avg_pool_3x3', 0)],
        reduce_concat=[2, 3, 4, 5],
    )""",
    "DARTS_V2": """Genotype(
        normal=[
            ('sep_conv_3x3', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('sep_conv_3x3', 1),
            ('sep_conv_3x3', 1), ('skip_connect', 0), ('skip_connect', 0), ('dil_conv_3x3', 2)],
        normal_concat=[2, 3, 4, 5],
        reduce=[
            ('max_pool_3x3', 0), ('max_pool_3x3', 1), ('skip_connect', 2), ('max_pool_3x3', 1),
            ('max_pool_3x3', 0), ('skip_connect', 2), ('skip_connect', 2), ('max_pool_3x3', 1)],
        reduce_concat=[2, 3, 4, 5],
    )""",
    "PC_DARTS_cifar": """Genotype(
        normal=[
            ('sep_conv_3x3', 1), ('skip_connect', 0), ('sep_conv_3x3', 0), ('dil_conv_3x3', 1),
            ('sep_conv_5x5', 0), ('sep_conv_3x3', 1), ('avg_pool_3x3', 0), ('dil_conv_3x3', 1)],
        normal_concat=[2, 3, 4, 5],
        reduce=[
            ('sep_conv_5x5', 1), ('max_pool_3x3', 0), ('sep_conv_5x5', 1), ('sep_conv_5x5', 2),
            ('sep_conv_3x3', 0), ('sep_conv_3x3', 3), ('sep_conv_3x3', 1), ('sep_conv_3x3', 2)],
        reduce_concat=[2, 3, 4, 5],
    )""",
    "PC_DARTS_image": """Genotype(
        normal=[
            ('skip_connect', 1), ('sep_conv_3x3', 0), ('sep_conv_3x3', 0), ('skip_connect', 1),
            ('sep_conv_3x3', 1), ('sep_conv_3x3', 3), ('sep_conv_3x3', 1), ('dil_conv_5x5', 4)],
        normal_concat=[2, 3, 4, 5],
        reduce=[
            ('sep_conv_3x3', 0), ('skip_connect', 1), ('dil_conv_5x5', 2), ('max_pool_3x3', 1),
            ('sep_conv_3x3', 2), ('sep_conv_3x3', 1), ('sep_conv_5x5', 0), ('sep_conv_3x3', 3)],
        reduce_concat=[2, 3, 4, 5],
    )""",
    "PDARTS": """Genotype(
        normal=[
            ('skip_connect', 0), ('dil_conv_3x3', 1), ('skip_connect', 0), ('sep_conv_3x3', 1),
            ('sep_conv_3x3', 1), ('sep_conv_3x3', 3), ('sep_conv_3x3', 0), ('dil_conv_5x5', 4)],
        normal_concat=[2, 3, 4, 5],
        reduce=[
            ('avg_pool_3x3', 0), ('sep_conv_5x5', 1), ('sep_conv_3x3', 0), ('dil_conv_5x5', 2),
            ('max_pool_3x3', 0), ('dil_conv_3x3', 1), ('dil_conv_3x3', 1), ('dil_conv_5x5', 3)],
        reduce_concat=[2, 3, 4, 5],
    )""",
}
NAMED: dict[str, Genotype] = {name: parse(text, name) for name, text in _PUBLISHED.items()}
NAMED["DARTS"] = NAMED["DARTS_V2"]
NAMED["PCDARTS"] = NAMED["PC_DARTS_cifar"]


# How the notation of a cell of NAS-Bench-201 begins.
CELL = re.compile(r"\|[a-z_0-9]+~0\|\+\|")


def refuse_cell(text: Any, place: str) -> None:
    """Raises InputError where the text is a cell of NAS-Bench-201."""
    if isinstance(text, str) and CELL.search(text):
        raise InputError(
            f"{place} is a cell of NAS-Bench-201, and such cells are neither trained nor drawn: "
            "benchmarks/nasbench201.py looks up what they are worth"
        )


def load_genotype(text: str | os.PathLike[str]) -> Genotype:
    """The genotype that `text` names. It is one of

    - the genotype written out, as `parse` reads it;
    - a name in `NAMED`, in any case;
    - the folder of a search: the best genotype in its genotype.json, else the last in its log;
    - a .json file: a search's genotype.json, or a genotype as `Genotype.as_json` gives it;
    - any other file: the last genotype in it, as in the logs of this project, the official code and pt.darts.

    A name goes before a file of that name: write ./DARTS for the file.

    Raises:
        InputError: it is none of these, or holds no valid genotype. Says which, and where it is wrong.
    """
    return load_titled(text)[1]


def load_titled(text: str | os.PathLike[str]) -> tuple[str, Genotype]:
    """The same with a title: the name, the folder's or the file's, or "genotype" where it is written out."""
    text = os.fspath(text)
    names = {name.lower(): name for name in NAMED}
    if text.strip().lower() in names:
        name = names[text.strip().lower()]
        return name, NAMED[name]
    if os.path.isdir(text):
        return Path(text).resolve().name, _read_folder(Path(text))
    if os.path.exists(text):
        return Path(text).stem, _read_file(Path(text))
    refuse_cell(text, shown(text))
    if "(" in text:
        return "genotype", parse(text)
    if os.path.dirname(text) or os.path.splitext(text)[1]:
        raise InputError(f"there is no file or folder {text!r} to read a genotype from")
    raise InputError(f"{shown(text)} is no genotype, file or folder{suggestion(text, NAMED)}")


def _read_folder(path: Path) -> Genotype:
    # log.txt is the official code's log; pt.darts and this project give the log the folder's name.
    names = ("genotype.json", f"{path.resolve().name}.log", "log.txt")
    for name in names:
        if os.path.exists(path / name):
            return _read_file(path / name)
    raise InputError(f"{str(path)!r} is not the folder of a search: it has no {', '.join(names)}")


def _read_file(path: Path) -> Genotype:
    quoted = repr(str(path))
    try:
        if path.suffix.lower() == ".json":
            return _from_json(read_json(path), quoted)
        return _last_in_log(read_file(path, LARGEST_LOG), quoted)
    except Unreadable as error:
        raise InputError(f"{quoted} {error}") from error


def _from_json(value: Any, place: str) -> Genotype:
    if isinstance(value, dict) and "best" in value:
        best = value["best"]
        if not isinstance(best, dict) or "genotype" not in best:
            raise InputError(f"{place}: best must have a genotype")
        refuse_cell(best["genotype"], f"{place}: best.genotype")
        return Genotype.from_json(best["genotype"], f"{place}: best.genotype")
    return Genotype.from_json(value, f"{place}: genotype")


def _last_in_log(content: bytes, place: str) -> Genotype:
    start = content.rfind(b"Genotype(")
    if start < 0:
        refuse_cell(content.decode(errors="replace"), f"what {place} holds")
        raise InputError(f"{place} holds no genotype: no line of it has Genotype(...)")
    line = content.rfind(b"\n", 0, start) + 1
    number = content.count(b"\n", 0, line) + 1
    before, after = (
        part.decode(errors="replace") for part in (content[line:start], content[start : start + LONGEST_TEXT])
    )
    return _Parser(before + after, len(before), f"{place}, line {number}").genotype()
