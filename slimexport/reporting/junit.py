"""junit.xml: one test case per gate, the form that every CI system shows."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

from slimexport.gates.decide import GateResult
from slimexport.reporting.schema import Report

# XML 1.0 has no form for these; a model's name may hold them.
_FORBIDDEN = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def render(report: Report) -> str:
    lost = sum(result.lost for result in report.gates)
    skipped = sum(result.outcome == "undecided" and not result.lost for result in report.gates)
    total = {"tests": str(len(report.gates)), "failures": str(lost), "errors": "0", "skipped": str(skipped)}
    root = ET.Element("testsuites", total)
    suite = ET.SubElement(root, "testsuite", {"name": "slimexport gates", **total, "time": "0"})
    properties = ET.SubElement(suite, "properties")
    for name, value in (("model", report.source.name), ("verdict", report.verdict)):
        ET.SubElement(properties, "property", {"name": name, "value": _clean(value)})
    for result in report.gates:
        case = ET.SubElement(
            suite, "testcase", {"classname": "slimexport.gate", "name": _clean(_name(result)), "time": "0"}
        )
        if result.lost:
            kind = "undecidable" if result.undecidable else result.outcome
            failure = ET.SubElement(case, "failure", {"type": kind, "message": _clean(result.message)})
            failure.text = _clean(result.message)
        elif result.outcome == "undecided":
            ET.SubElement(case, "skipped", {"message": _clean(result.message)})
        else:
            ET.SubElement(case, "system-out").text = _clean(result.message)
    ET.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _name(result: GateResult) -> str:
    return f"{result.export}: {result.gate}" if result.export else str(result.gate)


def _clean(text: str) -> str:
    return _FORBIDDEN.sub("\ufffd", text)
