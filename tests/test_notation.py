"""What a person may write for a genotype: round trips, and bad input is one sentence, whatever it is."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from darts_fast import Genotype, InputError, load_genotype
from darts_fast.files import LARGEST_JSON
from darts_fast.genotype import OPERATIONS, derive
from darts_fast.notation import LARGEST_LOG, LONGEST_TEXT, NAMED, parse

V2 = NAMED["DARTS_V2"]
FLAT = V2.flat()
anywhere = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def cells(draw, pairs):
    """A gene with `pairs` (a strategy) pairs a node, and a concat of some of its nodes."""
    nodes = draw(st.integers(1, 6))
    gene = []
    for node in range(nodes):
        pair = st.tuples(st.sampled_from(OPERATIONS), st.integers(0, node + 1))
        count = draw(pairs)
        gene.append(draw(st.lists(pair, min_size=count, max_size=count)))
    states = st.sampled_from(range(2, nodes + 2))
    concat = draw(
        st.one_of(st.just(range(2, nodes + 2)), st.lists(states, min_size=1, unique=True).filter(is_no_range))
    )
    return gene, concat


def is_no_range(states):
    return states != list(range(states[0], states[0] + len(states)))


@st.composite
def genotypes(draw, pairs):
    return Genotype(*draw(cells(pairs)), *draw(cells(pairs)))


def one_sentence(error):
    """The message, which is one printable line."""
    text = str(error.value)
    assert text.isprintable() and 10 < len(text) < 500
    return text


def noisy(draw, text):
    """The same notation with other blanks, quotes, brackets and a trailing comma."""
    blank = st.text(" \t\n\r\f", max_size=3)
    text = re.sub(r"[\[\](),=]", lambda mark: draw(blank) + mark[0] + draw(blank), text)
    if draw(st.booleans()):
        text = text.replace("'", '"')
    if draw(st.booleans()):
        text = re.sub(r"([\])])", r",\1", text) if "range" not in text else text
    return draw(blank) + text + draw(blank)


@given(genotypes(st.integers(1, 3)))
def test_nested_round_trip(genotype):
    assert parse(str(genotype)) == genotype
    assert Genotype.from_json(json.loads(json.dumps(genotype.as_json()))) == genotype


@given(genotypes(st.just(2)))
def test_flat_round_trip(genotype):
    assert parse(genotype.flat()) == genotype


@given(st.data(), genotypes(st.just(2)), st.booleans(), st.booleans())
def test_spelled_otherwise(data, genotype, flat, tuples):
    text = genotype.flat() if flat else str(genotype)
    if tuples:
        text = text.replace("[", "(").replace("]", ")")
    assert parse(noisy(data.draw, text)) == genotype


def test_no_flat_notation_of_three_pairs_a_node():
    genotype = V2._replace(normal=[[("skip_connect", 0)], *V2.normal[1:]])
    with pytest.raises(InputError) as error:
        genotype.flat()
    assert one_sentence(error) == "no flat notation: node 0 of normal has 1 pairs, not 2"


@pytest.mark.parametrize("rule", ["softmax", "raw"])
def test_what_a_search_derives_reads_back(rule):
    for _ in range(20):
        genotype = derive(torch.randn(14, 8), torch.randn(14, 8), rule)
        assert parse(str(genotype)) == parse(genotype.flat()) == genotype


def test_a_thousand_nodes():
    gene = [[("skip_connect", node), ("sep_conv_3x3", node + 1)] for node in range(1000)]
    genotype = Genotype(gene, range(2, 1002), gene[:1], range(2, 3))
    assert parse(str(genotype)) == parse(genotype.flat()) == genotype


# Bad text

WRONG = {  # what is done to the flat notation of DARTS_V2, or other text: the sentence
    (
        "sep_conv_3x3",
        "sep_conv_3X3",
    ): "character 19: 'sep_conv_3X3' is no operation; did you mean sep_conv_3x3?",
    ("sep_conv_3x3", "conv"): "character 19: 'conv' is no operation; known: max_pool_3x3, avg_pool_3x3, ",
    ("sep_conv_3x3", "none"): "character 19: 'none' is no operation of a genotype",
    (
        "'sep_conv_3x3', 0",
        "'sep_conv_3x3', 2",
    ): "character 35: node 0 reads the states before it, 0 to 1, not 2",
    (
        "'sep_conv_3x3', 0",
        "'sep_conv_3x3', -1",
    ): "character 35: node 0 reads the states before it, 0 to 1, not -1",
    ("'sep_conv_3x3', 0", "'sep_conv_3x3', 0.5"): "character 36: '.' begins nothing that belongs here",
    (
        "'sep_conv_3x3', 0",
        "'sep_conv_3x3'",
    ): "character 18: expected an (operation, source state) pair, found ['sep_",
    ("'sep_conv_3x3', 0", "'sep_conv_3x3' 0"): "character 34: expected ',' or ')', found '0'",
    (
        "('sep_conv_3x3', 0), ",
        "",
    ): "character 144: a flat list has two pairs a node, and the last, ['dil_conv",
    ("[('sep_conv_3x3'", "[[('sep_conv_3x3'"): "character 188: expected a value, found 'normal_concat'",
    ("normal=[", "normal=[[[["): "character 20: expected nothing nested deeper than a pair, found '['",
    ("normal=", "Normal="): "character 10: expected 'normal', found 'Normal'",
    ("reduce=", "normal="): "character 214: expected 'reduce', found 'normal'",
    ("Genotype", "genotype"): "character 1: expected 'Genotype', found 'genotype'",
    ("2)], normal_concat", "2], normal_concat"): "expected ',' or ')', found ']'",
    ("range(2, 6)", "[]"): "expected a list of states, or a range, found []",
    ("range(2, 6)", "4"): "expected a list of states, or a range, found 4",
    ("range(2, 6)", "range(6, 2)"): "the concat is empty",
    ("range(2, 6)", "range(6)"): "expected ',', found ')'",
    ("range(2, 6)", "range(1, 6)"): "a concat is made of the nodes' states, 2 to 5, not 1",
    ("range(2, 6)", "range(2, 999999999)"): "a concat is made of the nodes' states, 2 to 5, not 6",
    ("range(2, 6)", "range(2, 10**30)"): "'*' begins nothing that belongs here",
    ("range(2, 6)", f"range(2, {10**30})"): "is a number too large",
    ("range(2, 6)", f"range(2, {'9' * 5000})"): "is a number too large",
    ("range(2, 6)", "[3, 2, 3]"): "state 3 is twice in the concat",
    ("range(2, 6)", "[2, True]"): "expected a value, found 'True'",
    ("range(2, 6)", "['2']"): "a concat is made of the nodes' states, 2 to 5, not '2'",
    FLAT[:-1]: "character 416: expected ')', found the end",
    FLAT + ")": "character 417: expected nothing more, found ')'",
    FLAT[: FLAT.index(", reduce=")] + ")": "character 212: expected ',', found ')'",
    FLAT[:15] + "='": 'character 17: "\'" opens a quotation that is not closed',
    FLAT[:1]: "'G' is no genotype, file or folder; known: ",
    "DARTSV2": "'DARTSV2' is no genotype, file or folder; did you mean DARTS_V2?",
    "": "'' is no genotype, file or folder; known: NASNet, AmoebaNet, ",
    "none.json": "there is no file or folder 'none.json'",
    "searchs/first": "there is no file or folder 'searchs/first'",
    "\0(": "character 1: '\\x00' begins nothing that belongs here",
    "\udc80(": "character 1: '\\udc80' begins nothing that belongs here",
    "\udc80\0/": "there is no file or folder '\\udc80\\x00/'",
    "Genotype(normal=" + "[" * 50_000: "character 20: expected nothing nested deeper than a pair",
    "(" * (LONGEST_TEXT + 1): "genotype has 100,001 characters, more than the 100,000 that are read",
    "__import__('os').system('touch x')": "character 1: expected 'Genotype', found '__import__'",
    "Genotype(normal=__import__('os').system('x'))": "character 17: expected a list, found '__import__'",
}


@pytest.mark.parametrize(
    "change", WRONG, ids=lambda change: str(change)[:40].encode("ascii", "replace").decode()
)
def test_what_is_wrong_is_named_with_its_position(change, in_tmp):
    text = change if isinstance(change, str) else FLAT.replace(*change, 1)
    with pytest.raises(InputError) as error:
        load_genotype(text)
    assert WRONG[change] in one_sentence(error)
    assert os.listdir(in_tmp) == []


def only_an_input_error(text):
    """And what it says that it found stands where it says."""
    try:
        assert isinstance(load_genotype(text), Genotype)
    except InputError as error:
        assert str(error).isprintable() and len(str(error)) < 500 + len(text)
        found = re.search(r"character (\d+): .*found '(\w+)'$", str(error))
        assert not found or text[int(found[1]) - 1 :].lstrip("'\"").startswith(found[2])


@given(
    st.text(st.characters(), max_size=60)
    | st.text("Genotype(normal=[]'\"),_ 0123456789\0\ud800", max_size=80)
)
@anywhere
def test_no_text_escapes(in_tmp, text):
    only_an_input_error(text)
    assert os.listdir(in_tmp) == []


@given(st.data(), st.sampled_from([str(V2), FLAT]))
@settings(anywhere, max_examples=300)
def test_no_damaged_genotype_escapes(in_tmp, data, text):
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text)))
        end = data.draw(st.integers(start, min(start + 8, len(text))))
        put = data.draw(
            st.sampled_from(list("[](),='\"0 9x-.\\\n\0")) | st.text(max_size=4) | st.just(text[:40])
        )
        text = text[:start] + put + text[end:]
    only_an_input_error(text)
    assert os.listdir(in_tmp) == []


# Names


def test_named_genotypes():
    assert set(NAMED) >= {"NASNet", "AmoebaNet", "DARTS_V1", "DARTS_V2", "DARTS", "PC_DARTS_cifar", "PDARTS"}
    assert load_genotype("darts") is load_genotype(" DARTS_v2 ") is NAMED["DARTS_V2"]
    nasnet, amoebanet = NAMED["NASNet"], NAMED["AmoebaNet"]
    assert len(nasnet.normal) == len(amoebanet.reduce) == 5
    assert nasnet.reduce_concat == range(4, 7) and amoebanet.reduce_concat == [3, 4, 6]
    assert nasnet.normal[3] == [("avg_pool_3x3", 0), ("avg_pool_3x3", 0)]  # the same edge twice
    assert amoebanet.reduce[4] == [("conv_7x1_1x7", 0), ("sep_conv_3x3", 5)]
    for genotype in NAMED.values():
        assert parse(str(genotype)) == parse(genotype.flat()) == genotype


def test_a_name_goes_before_a_file(in_tmp):
    (in_tmp / "DARTS").write_text(str(NAMED["NASNet"]))
    assert load_genotype("DARTS") == V2
    assert load_genotype("./DARTS") == NAMED["NASNet"]


# Files


def test_json_files_and_search_folders(in_tmp):
    best, final = NAMED["DARTS_V1"], V2
    search = in_tmp / "first (1)"
    search.mkdir()
    records = {"best": {"epoch": 1, "genotype": best.as_json()}, "final": {"genotype": final.as_json()}}
    (search / "genotype.json").write_text(json.dumps(records))
    (in_tmp / "plain.JSON").write_text(json.dumps(NAMED["AmoebaNet"].as_json()))
    assert load_genotype("first (1)") == load_genotype("first (1)/genotype.json") == best
    assert load_genotype("plain.JSON") == load_genotype(Path("plain.JSON")) == NAMED["AmoebaNet"]


OURS = (
    f"11/24 06:00:00 | genotype = {NAMED['DARTS_V1']}\n11/24 06:01:00 | Best validation top-1 90.00%\n{V2}\n"
)
OFFICIAL = (
    f"2018-11-24 06:00:00,123 genotype = {NAMED['DARTS_V1'].flat()}\n11/24 06:00:00 AM genotype = {FLAT}\n"
)
OFFICIAL += "11/24 06:00:00 AM valid_acc 88.1\n"
PT_DARTS = (
    f"11/24 06:00:00 AM | genotype = {NAMED['DARTS_V1']}\r\n11/24 06:01:00 AM | Best Genotype = {V2}\r\n"
)


@pytest.mark.parametrize("log", [OURS, OFFICIAL, PT_DARTS, str(V2), FLAT.replace(", ", ",\n  ")])
def test_the_last_genotype_of_a_log(log, in_tmp):
    (in_tmp / "a.log").write_bytes(b"\xff\0 not UTF-8\n" + log.encode())
    assert load_genotype("a.log") == V2


@pytest.mark.parametrize("name", ["log.txt", "mine.log"])
def test_the_folder_of_another_codes_search(name, in_tmp, monkeypatch):
    (in_tmp / "mine").mkdir()
    (in_tmp / "mine" / name).write_text(OFFICIAL)
    assert load_genotype("mine") == load_genotype("mine/") == V2
    monkeypatch.chdir("mine")
    assert load_genotype(".") == V2


def test_where_a_log_is_wrong(in_tmp):
    (in_tmp / "cut.log").write_text(OURS[: OURS.rindex("range")])
    with pytest.raises(InputError) as error:
        load_genotype("cut.log")
    column = str(V2).rindex("range") + 1
    assert one_sentence(error) == f"'cut.log', line 3, character {column}: expected a list, found the end"
    (in_tmp / "typo.log").write_text(OURS + "\n12:00 | " + str(V2).replace("skip", "skp", 1))
    with pytest.raises(
        InputError, match="'typo.log', line 5, .* 'skp_connect' is no operation; did you mean"
    ):
        load_genotype("typo.log")


GOOD = V2.as_json()
BAD_JSON = {
    "{": "cannot be read as JSON",
    "": "cannot be read as JSON",
    "[" * 100_000: "cannot be read as JSON",
    "[]": "genotype must have normal, normal_concat, reduce, reduce_concat and nothing else",
    "null": "genotype must have normal",
    '{"best": null}': "best must have a genotype",
    '{"best": {"genotype": 3}}': "best.genotype must have normal",
    json.dumps({**GOOD, "more": 1}): "genotype must have normal",
    json.dumps({**GOOD, "normal": []}): "genotype.normal: expected a list of nodes or pairs, found []",
    json.dumps({**GOOD, "normal": None}): "genotype.normal: expected a list of nodes or pairs, found None",
    json.dumps(
        {**GOOD, "normal": [[]]}
    ): "genotype.normal[0]: expected a node, which is a list of pairs, found []",
    json.dumps(
        {**GOOD, "normal": [[["skip_connect", True]]]}
    ): "normal[0][0]: expected an (operation, source",
    json.dumps({**GOOD, "normal": [[["skip_connect", 0.0]]]}): "normal[0][0]: expected an (operation, source",
    json.dumps(
        {**GOOD, "normal": [[["skip_connect", 0, 0]]]}
    ): "normal[0][0]: expected an (operation, source",
    json.dumps({**GOOD, "normal": [[[["skip_connect"], 0]]]}): "normal[0][0]: expected an (operation, source",
    json.dumps({**GOOD, "normal": [[["skip", 0]]]}): "normal[0][0][0]: 'skip' is no operation",
    json.dumps({**GOOD, "normal": [[["skip_connect", 10**400]]]}): "normal[0][0][1]: node 0 reads the states",
    json.dumps(
        {**GOOD, "reduce_concat": {}}
    ): "reduce_concat: expected a list of states, or a range, found {}",
    json.dumps({**GOOD, "reduce_concat": [True]}): "reduce_concat[0]: a concat is made of the nodes' states",
    json.dumps({**GOOD, "reduce_concat": [3, 3]}): "reduce_concat[1]: state 3 is twice in the concat",
}


@pytest.mark.parametrize("content", BAD_JSON, ids=range(len(BAD_JSON)))
def test_bad_json_is_one_sentence(content, in_tmp):
    (in_tmp / "a.json").write_text(content)
    with pytest.raises(InputError) as error:
        load_genotype("a.json")
    text = one_sentence(error)
    assert text.startswith("'a.json'") and BAD_JSON[content] in text


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(OPERATIONS)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
)


@given(st.fixed_dictionaries({field: values | st.just(GOOD[field]) for field in Genotype._fields}) | values)
@example({**GOOD, "normal": [[["skip_connect", 0]]] * 4})
def test_no_json_value_escapes(content):
    try:
        assert isinstance(Genotype.from_json(content), Genotype)
    except InputError as error:
        assert str(error).isprintable() and len(str(error)) < 500


def test_files_that_hold_none(in_tmp):
    (in_tmp / "empty").mkdir()
    (in_tmp / "a.log").write_text("nothing here\n")
    with (in_tmp / "big.log").open("wb") as file:
        file.truncate(LARGEST_LOG + 1)
    with (in_tmp / "big.json").open("wb") as file:
        file.truncate(LARGEST_JSON + 1)
    for name, sentence in {
        "empty": "is not the folder of a search: it has no genotype.json, empty.log, log.txt",
        "a.log": "holds no genotype",
        "big.log": "has more than 64 MiB",
        "big.json": "has more than 1 MiB",
    }.items():
        with pytest.raises(InputError) as error:
            load_genotype(name)
        assert one_sentence(error).startswith(f"'{name}' {sentence}")


# A file that never ends must be refused unread; Windows has none.
@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="needs /dev/zero, a file that never ends")
def test_a_device_is_no_file():
    with pytest.raises(InputError, match="'/dev/zero' is not a regular file"):
        load_genotype("/dev/zero")
