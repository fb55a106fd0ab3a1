"""Opt-outs inside image files: hostile bytes, and C2PA manifests read by the extra `c2pa`."""

from __future__ import annotations

import datetime
import functools
import io
import struct
import time
import zlib
from typing import Any

import pytest
from PIL import Image

from animesion.images import opt_outs
from animesion.schemas import DropReason

RDF = b'<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'


@functools.cache
def hostile() -> dict[str, tuple[bytes, str]]:
    """Files of a few megabytes that are slow or large for a careless reader."""
    bomb = zlib.compress(RDF + b"noai" + bytes(64 << 20), 9)
    chunk = b"iTXt" + b"XML:com.adobe.xmp\0\1\0\0\0" + bomb
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(chunk) - 4) + chunk + b"crc "
    laughs = b"".join(b'<!ENTITY a%d "%s">' % (i + 1, b"&a%d;" % i * 10) for i in range(12))
    return {
        "segments": (b"\xff\xd8" + b"\xff\xe1\0\2" * 1_000_000, "jpg"),
        "fill bytes": (b"\xff\xd8" + b"\xff" * 4_000_000, "jpg"),
        "chunks": (b"\x89PNG\r\n\x1a\n" + bytes(12) * 500_000, "png"),
        "packets": (RDF * 100_000, "gif"),
        "closed packets": ((RDF + b"noai</rdf:RDF>") * 50_000, "gif"),
        "open tags": (b"<" * 2_000_000 + b"22-rdf-syntax-ns#" * 100_000, "tif"),
        "deep": (RDF + b"<noai>" * 600_000, "webp"),
        "bomb": (png, "png"),
        "entities": (
            b"<x:xmpmeta><!DOCTYPE x [" + laughs + b"]>" + RDF + b"&a12; DataMining</rdf:RDF></x:xmpmeta>",
            "tif",
        ),
        "pieces": (b"\xff\xd8" + b"\xff\xeb\0\x14JP\0\1\0\0\0\1\0\0\0\x10jumbxx" * 200_000, "jpg"),
        "blocks": (b"GIF89ajumb\x21\xff\x0bC2PA_GIF\1\0\0" + b"\1x" * 1_000_000, "gif"),
    }


@pytest.mark.parametrize("name", hostile())
def test_hostile_files_are_searched_quickly(name: str) -> None:
    content, extension = hostile()[name]
    start = time.process_time()
    reason, evidence = opt_outs.find(content, extension)
    assert time.process_time() - start < 2
    reserved = {"closed packets", "deep", "bomb", "entities"}
    assert reason == (DropReason.METADATA_OPT_OUT if name in reserved else ""), evidence
    assert len(evidence) < 300
    assert evidence.isprintable()


def test_a_property_with_another_prefix_or_in_a_bag_is_found_and_one_of_another_vocabulary_is_not() -> None:
    def packet(namespace: str, value: str) -> bytes:
        body = f'<q:DataMining xmlns:q="{namespace}">{value}</q:DataMining>'
        return RDF + f"<rdf:Description>{body}</rdf:Description></rdf:RDF>".encode()

    plus = "http://ns.useplus.org/ldf/xmp/1.0/"
    assert opt_outs.find(packet(plus, "DMI&#45;PROHIBITED"), "gif") == (
        DropReason.METADATA_OPT_OUT,
        "XMP: plus:DataMining: DMI-PROHIBITED",
    )
    assert opt_outs.find(packet(plus, "<rdf:Bag><rdf:li> DMI-NEW </rdf:li></rdf:Bag>"), "gif")[1].endswith("DMI-NEW")
    assert opt_outs.find(packet(plus, " dmi-allowed "), "gif") == ("", "")
    assert opt_outs.find(packet("urn:mine", "DMI-PROHIBITED"), "gif") == ("", "")


def test_a_keyword_of_iim_refuses_in_every_format() -> None:
    def iim(*values: bytes) -> bytes:
        return b"".join(b"\x1c\x02\x19" + struct.pack(">H", len(value)) + value for value in values)

    def jpeg(data: bytes) -> bytes:
        block = b"Photoshop 3.0\0" + b"8BIM\x04\x04\0\0" + struct.pack(">I", len(data)) + data
        image = io.BytesIO()
        Image.new("RGB", (8, 8)).save(image, "JPEG")
        return image.getvalue()[:2] + b"\xff\xed" + struct.pack(">H", len(block) + 2) + block + image.getvalue()[2:]

    found = (DropReason.METADATA_OPT_OUT, "IPTC-IIM: 2:25: noai")
    assert opt_outs.find(jpeg(iim(b"rose", b"NoAI")), "jpg") == found
    assert opt_outs.find(jpeg(iim(b"rose", b"noaiming", b"casino ai")), "jpg") == ("", "")
    assert opt_outs.find(jpeg(iim(b"rose") + b"noai"), "jpg") == ("", "")  # after the dataset, so not part of it
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "TIFF", tiffinfo={33723: iim(b"art, noimageai")})
    assert opt_outs.find(image.getvalue(), "tif")[1] == "IPTC-IIM: 2:25: noimageai"
    profile = zlib.compress(b"\niptc\n      9\n" + iim(b"noai").hex().encode() + b"\n")
    chunk = b"zTXtRaw profile type iptc\0\0" + profile
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(chunk) - 4) + chunk + b"crc "
    assert opt_outs.find(png, "png") == found
    start = time.process_time()
    assert opt_outs.find(b"\xff\xd8" + (b"\x1c\x02\x19\x00\x04xnoai") * 400_000, "jpg") == ("", "")
    assert time.process_time() - start < 2


# -- C2PA ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def credentials() -> tuple[bytes, bytes]:
    """A certificate chain and its key, as C2PA asks for."""
    pytest.importorskip("c2pa", reason="the extra c2pa is not installed")
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    root, leaf = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    now = datetime.datetime.now(datetime.UTC)

    def certificate(subject: str, key: ec.EllipticCurvePrivateKey, authority: bool) -> bytes:
        names = [
            x509.Name([x509.NameAttribute(x509.oid.NameOID.ORGANIZATION_NAME, name)]) for name in (subject, "root")
        ]
        builder = x509.CertificateBuilder(*reversed(names), key.public_key(), x509.random_serial_number())
        builder = builder.not_valid_before(now - datetime.timedelta(1)).not_valid_after(now + datetime.timedelta(30))
        usage = dict.fromkeys(
            ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only"), False
        )
        usage |= {"digital_signature": True, "key_cert_sign": authority, "crl_sign": authority, "decipher_only": False}
        for extension, critical in (
            (x509.BasicConstraints(authority, None), True),
            (x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False),
            (x509.AuthorityKeyIdentifier.from_issuer_public_key(root.public_key()), False),
            (x509.KeyUsage(**usage), True),
            (x509.ExtendedKeyUsage([x509.oid.ExtendedKeyUsageOID.EMAIL_PROTECTION]), False),
        ):
            builder = builder.add_extension(extension, critical)
        return builder.sign(root, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    private = leaf.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return certificate("leaf", leaf, False) + certificate("root", root, True), private


def signed(credentials: tuple[bytes, bytes], label: str, use: str, kind: str) -> bytes:
    c2pa: Any = pytest.importorskip("c2pa", reason="the extra c2pa is not installed")

    image, out = io.BytesIO(), io.BytesIO()
    Image.effect_noise((64, 64), 90).convert("RGB").save(image, kind)
    image.seek(0)
    prefix = label.partition(".")[0]
    entries = {f"{prefix}.ai_training": {"use": use}, f"{prefix}.data_mining": {"use": "allowed"}}
    created = {"action": "c2pa.created", "digitalSourceType": "http://cv.iptc.org/newscodes/digitalsourcetype/print"}
    assertions = [
        {"label": "c2pa.actions", "data": {"actions": [created]}},
        {"label": label, "data": {"entries": entries}},
    ]
    info = c2pa.C2paSignerInfo(alg=b"es256", sign_cert=credentials[0], private_key=credentials[1], ta_url=None)
    claim = {"claim_generator_info": [{"name": "tests", "version": "1"}], "title": "t", "assertions": assertions}
    c2pa.Builder(claim).sign(c2pa.Signer.from_info(info), f"image/{kind.lower()}", image, out)
    return out.getvalue()


@pytest.mark.parametrize("use", ["notAllowed", "constrained", "allowed"])
@pytest.mark.parametrize(("label", "kind"), [("c2pa.training-mining", "JPEG"), ("cawg.training-mining", "PNG")])
def test_a_signed_assertion_is_read_with_the_extra_and_only_recognised_without_it(
    credentials: tuple[bytes, bytes], monkeypatch: pytest.MonkeyPatch, label: str, kind: str, use: str
) -> None:
    content, extension = signed(credentials, label, use, kind), {"JPEG": "jpg", "PNG": "png"}[kind]
    reason, evidence = opt_outs.find(content, extension)
    told = f"C2PA: {label}: {label.partition('.')[0]}.ai_training: {use}"
    assert (reason, evidence) == (("", "") if use == "allowed" else (DropReason.C2PA_OPT_OUT, told))
    damaged = content.replace(b"ai_training", b"ai_trainin\xff")
    assert opt_outs.find(damaged, extension)[0] == DropReason.C2PA_OPT_OUT
    monkeypatch.setattr(opt_outs, "_LIBRARY", "no_such_module")
    reason, evidence = opt_outs.find(content, extension)
    assert reason == DropReason.C2PA_OPT_OUT
    assert evidence == f"C2PA: {label}, which is not read without the extra: pip install 'animesion[c2pa]'"
