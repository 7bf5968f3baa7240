"""The record of an output as PREMIS 3 XML, for preservation systems: two objects, what happened, and who did it.

Pure: the JSON record beside the output is all that is needed, so the XML can be made again at any time. The output is
said to be derived from the source (``derivation``, ``has source``) by a ``creation``; PREMIS has an event code that
looks like "derivation" but means decryption, and it is not used.

Source: PREMIS Data Dictionary 3.0 and its XML schema; event types of id.loc.gov/vocabulary/preservation/eventType.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from xml.etree import ElementTree as ET

from supir_batch.provenance import MEDIA_TYPES

NAMESPACE = "http://www.loc.gov/premis/v3"

_SCHEMA = "https://www.loc.gov/standards/premis/v3/premis-v3-0.xsd"
_XSI = "http://www.w3.org/2001/XMLSchema-instance"
_EVENT_TYPES = "http://id.loc.gov/vocabulary/preservation/eventType"
_CODES = {
    "fixity check": "fix",
    "message digest calculation": "mes",
    "creation": "cre",
    "metadata modification": "mem",
    "digital signature generation": "dsg",
}
_IDENTIFIERS = uuid.uuid5(uuid.NAMESPACE_URL, "urn:x-supir-batch:premis")
_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # characters that XML 1.0 cannot hold


class _Agent(NamedTuple):
    kind: str  # software | person | organization
    id_type: str
    id: str
    name: str
    role: str  # in events
    version: str = ""
    note: str = ""


class _Event(NamedTuple):
    name: str
    moment: str
    detail: str
    of_source: bool  # else of the output
    outcome: str = ""
    note: str = ""


def document(record: Mapping[str, Any]) -> bytes:
    """The XML (UTF-8) that tells of an output what its JSON ``record`` tells; valid against the PREMIS 3.0 schema.

    Raises KeyError for a record that lacks what every record of this package has.
    """
    agents, events = _agents(record), list(_events(record))
    root = ET.Element("premis", {"xmlns": NAMESPACE, "xmlns:xsi": _XSI, "version": "3.0"})
    root.set("xsi:schemaLocation", f"{NAMESPACE} {_SCHEMA}")
    _output(root, record, events)
    _source(root, record, events)
    for event in events:
        _event(root, record, event, agents)
    for agent in agents:
        _agent(root, agent)
    ET.indent(root)
    return f"<?xml version='1.0' encoding='UTF-8'?>\n{ET.tostring(root, encoding='unicode')}\n".encode()


# --- what is told --------------------------------------------------------------------------------------------------


def _agents(record: Mapping[str, Any]) -> list[_Agent]:
    """Who took part: the program, the model if there was one, operator and organization where they are known."""
    tool, version = record["tool"], record["tool_version"]
    found = [_Agent("software", "name and version", f"{tool} {version}", tool, "executing program", version)]
    if record["model_sha256"]:
        note = "weights of a generative model; what it adds need not have been in the original"
        digest, name = record["model_sha256"], record["engine_name"]
        found.append(_Agent("software", "SHA-256", digest, name, "model", f"sha256:{digest}", note))
    for kind, role in (("operator", "implementer"), ("organization", "authorizer")):
        name = record["settings"].get(kind)
        if name:
            found.append(_Agent("person" if kind == "operator" else kind, "name", name, name, role))
    return found


def _events(record: Mapping[str, Any]) -> Iterator[_Event]:
    run, output = record["run"], record["output"]
    started, finished = run.get("started_at") or run["finished_at"], run["finished_at"]
    digest = f"SHA-256 {record['source_sha256']}"
    if run.get("source_sha256_given"):
        yield _Event(
            "fixity check", started, "the source's SHA-256 against the one that was given", True, "pass", digest
        )
    else:
        yield _Event("message digest calculation", started, "of the source, while it was read", True, "", digest)
    kind = "generative reconstruction" if record["generative"] else "processing without a generative model"
    told = {
        "engine": record["engine_name"],
        "digital_source_type": record["digital_source_type"],
        "model_sha256": record["model_sha256"],
        "settings_sha256": record["settings_sha256"],
        "seed": record["seed"],
        "prompt": record["prompt"],
        "negative_prompt": record["negative_prompt"],
        "caption_source": record["caption_source"],
        "settings": record["settings"],
    }
    detail = f"{kind}: {json.dumps(told, ensure_ascii=False, sort_keys=True)}"
    yield _Event("creation", finished, detail, False, "success", record["notice"])
    copied = "metadata of the source copied, and that of the reconstruction added: EXIF, IPTC IIM, XMP"
    yield _Event("metadata modification", finished, copied, False, "success", "; ".join(record["notes"]))
    if record.get("signature"):
        signer = ", ".join(f"{key} {value}" for key, value in sorted(record["signature"].items()))
        yield _Event("digital signature generation", finished, "C2PA content credentials", False, "success", signer)
    yield _Event(
        "message digest calculation", finished, "of the finished output", False, "", f"SHA-256 {output['sha256']}"
    )


# --- how it is written ---------------------------------------------------------------------------------------------


def _add(parent: ET.Element, name: str, text: object = "", **attributes: str) -> ET.Element:
    child = ET.SubElement(parent, name, attributes)
    if text != "":
        child.text = _FORBIDDEN.sub("\ufffd", str(text))
    return child


def _identify(parent: ET.Element, name: str, kind: str, value: str) -> ET.Element:
    element = _add(parent, f"{name}Identifier")
    _add(element, f"{name}IdentifierType", kind)
    _add(element, f"{name}IdentifierValue", value)
    return element


def _output_id(record: Mapping[str, Any]) -> tuple[str, str]:
    return "xmpMM:InstanceID", record["instance_id"]


def _source_id(record: Mapping[str, Any]) -> tuple[str, str]:
    return "SHA-256", record["source_sha256"]


def _event_id(record: Mapping[str, Any], event: _Event) -> tuple[str, str]:
    """Name-based, so that the same event has the same identifier whenever the XML is made."""
    subject = "source" if event.of_source else "output"
    named = f"{record['fingerprint']}:{record['output']['sha256']}:{event.moment}:{event.name}:{subject}"
    return "UUID", str(uuid.uuid5(_IDENTIFIERS, named))


def _output(root: ET.Element, record: Mapping[str, Any], events: Sequence[_Event]) -> None:
    output = record["output"]
    element = _add(root, "object", **{"xsi:type": "file"})
    _identify(element, "object", *_output_id(record))
    _identify(element, "object", "supir-batch fingerprint", record["fingerprint"])
    width, height = record["output_size"]
    for name, value in (
        ("generative reconstruction", record["generative"]),
        ("digital source type", record["digital_source_type"]),
        ("pixels", f"{width} x {height}"),
        ("bits per sample", record["output_bit_depth"]),
    ):
        significant = _add(element, "significantProperties")
        _add(significant, "significantPropertiesType", name)
        _add(significant, "significantPropertiesValue", value)
    traits = _traits(element, output["sha256"], output["bytes"], record["output_format"], record["tool"])
    application = _add(traits, "creatingApplication")
    _add(application, "creatingApplicationName", record["tool"])
    _add(application, "creatingApplicationVersion", record["tool_version"])
    _add(application, "dateCreatedByApplication", record["run"]["finished_at"])
    _add(element, "originalName", output["name"])
    relationship = _add(element, "relationship")
    _add(relationship, "relationshipType", "derivation")
    _add(relationship, "relationshipSubType", "has source")
    _identify(relationship, "relatedObject", *_source_id(record))
    creation = next(event for event in events if event.name == "creation")
    _identify(relationship, "relatedEvent", *_event_id(record, creation))
    for event in events:
        if not event.of_source:
            _identify(element, "linkingEvent", *_event_id(record, event))


def _source(root: ET.Element, record: Mapping[str, Any], events: Sequence[_Event]) -> None:
    element = _add(root, "object", **{"xsi:type": "file"})
    _identify(element, "object", *_source_id(record))
    _traits(
        element, record["source_sha256"], record["run"].get("source_bytes"), record["source_format"], record["tool"]
    )
    _add(element, "originalName", record["source_name"])
    for event in events:
        if event.of_source or event.name == "creation":
            _identify(element, "linkingEvent", *_event_id(record, event))


def _traits(element: ET.Element, digest: str, size: int | None, file_format: str, originator: str) -> ET.Element:
    traits = _add(element, "objectCharacteristics")
    _add(traits, "compositionLevel", 0)
    fixity = _add(traits, "fixity")
    _add(fixity, "messageDigestAlgorithm", "SHA-256")
    _add(fixity, "messageDigest", digest)
    _add(fixity, "messageDigestOriginator", originator)
    if size is not None:
        _add(traits, "size", size)
    designation = _add(_add(traits, "format"), "formatDesignation")
    _add(designation, "formatName", MEDIA_TYPES.get(file_format, file_format))
    return traits


def _event(root: ET.Element, record: Mapping[str, Any], event: _Event, agents: Sequence[_Agent]) -> None:
    element = _add(root, "event")
    _identify(element, "event", *_event_id(record, event))
    uri = f"{_EVENT_TYPES}/{_CODES[event.name]}"
    _add(element, "eventType", event.name, authority="eventType", authorityURI=_EVENT_TYPES, valueURI=uri)
    _add(element, "eventDateTime", event.moment)
    _add(_add(element, "eventDetailInformation"), "eventDetail", event.detail)
    if event.outcome or event.note:
        information = _add(element, "eventOutcomeInformation")
        if event.outcome:
            _add(information, "eventOutcome", event.outcome)
        if event.note:
            _add(_add(information, "eventOutcomeDetail"), "eventOutcomeDetailNote", event.note)
    for agent in agents:
        if agent.role != "model" or event.name == "creation":
            linked = _identify(element, "linkingAgent", agent.id_type, agent.id)
            _add(linked, "linkingAgentRole", agent.role)
    if event.of_source or event.name == "creation":
        linked = _identify(element, "linkingObject", *_source_id(record))
        _add(linked, "linkingObjectRole", "source")
    if not event.of_source:
        linked = _identify(element, "linkingObject", *_output_id(record))
        _add(linked, "linkingObjectRole", "outcome")


def _agent(root: ET.Element, agent: _Agent) -> None:
    element = _add(root, "agent")
    _identify(element, "agent", agent.id_type, agent.id)
    _add(element, "agentName", agent.name)
    _add(element, "agentType", agent.kind)
    if agent.version:
        _add(element, "agentVersion", agent.version)
    if agent.note:
        _add(element, "agentNote", agent.note)
