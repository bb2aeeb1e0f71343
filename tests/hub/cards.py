"""What the Hub asks of a model card's metadata, as its documentation says.

github.com/huggingface/hub-docs: modelcard.md, docs/hub/model-cards.md, docs/hub/repositories-licenses.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import yaml

from hub.exchange import Answer, Request, answer_json

if TYPE_CHECKING:
    from hub.server import Hub

BLOCK = re.compile(r"^(\s*---(?:\r\n|\r|\n))([\S\s]*?)((?:\r\n|\r|\n)---[ \t]*(\r\n|\n|$))")
_LICENSES = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl
    lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib
    pddl lgpl-lr deepfloyd-if-license llama2 gemma unknown other
"""
RELATIONS = {"adapter", "merge", "quantized", "finetune"}
TASKS = {"text-to-image", "text-to-video", "text-to-audio", "image-to-image", "image-to-video", "video-to-video"}
REPOSITORY = r"[\w.-]+/[\w.-]+"


def validate_card(hub: Hub, request: Request) -> Answer:
    found = [{"message": message} for message in card_errors(request.json["content"])]
    return answer_json({"errors": found, "warnings": []}, 400 if found else 200)


def card_errors(content: str) -> Iterator[str]:
    block = BLOCK.search(content)
    try:
        found = yaml.safe_load(block.group(2)) if block else {}
    except yaml.YAMLError as error:
        yield f"the metadata is no YAML: {error}"
        return
    if not isinstance(found, dict):
        yield "the metadata is no mapping"
        return
    yield from _license(found)
    bases = found.get("base_model", [])
    for base in [bases] if isinstance(bases, str) else bases:
        if not (isinstance(base, str) and re.fullmatch(REPOSITORY, base)):
            yield f'"base_model" must be the id of a model: {base!r}'
    for key, known in (("base_model_relation", RELATIONS), ("pipeline_tag", TASKS)):
        if found.get(key, min(known)) not in known:
            yield f'"{key}" must be one of {sorted(known)}'
    if not all(isinstance(tag, str) and tag for tag in found.get("tags", [])):
        yield '"tags" must be strings'
    if not isinstance(found.get("library_name", ""), str):
        yield '"library_name" must be a string'


def _license(found: Mapping[str, Any]) -> Iterator[str]:
    said = found.get("license")
    if said is not None and said not in _LICENSES.split():
        yield f'"license" must be one of the known identifiers, or "other": {said!r}'
    if said == "other" and not found.get("license_name"):
        yield '"license_name" is needed where "license" is "other"'
    if said is not None and said != "other" and "license_name" in found:
        yield '"license_name" is for "license: other" only'
