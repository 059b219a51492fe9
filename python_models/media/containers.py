"""Which container a video or sound file is, by its first bytes.

FFmpeg's own guess is not used on purpose: it also recognises playlists (HLS, DASH, concat), which name further files
and URLs that FFmpeg would open. Only containers that hold their data themselves are listed here, and the demuxer is
forced to what was found.
"""

from __future__ import annotations

_ISO_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")
_TS_PACKET = 188


def container_of(head: bytes) -> str | None:
    """FFmpeg's name of the demuxer, or None for bytes that are no media container.

    Args:
        head: the first bytes of the file, 1 KiB or more where it has them.
    """
    for signature, name in _SIGNATURES:
        if head.startswith(signature):
            return name
    if head[4:8] in _ISO_BOXES:
        return "mov"
    if head[:4] == b"RIFF" and head[8:12] in (b"AVI ", b"WAVE"):
        return "avi" if head[8:12] == b"AVI " else "wav"
    for start, step in ((0, _TS_PACKET), (4, _TS_PACKET + 4)):
        if len(head) > start + 2 * step and all(head[start + k * step] == 0x47 for k in range(3)):
            return "mpegts"
    if len(head) > 2 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0:
        # MPEG audio frame sync; layer bits 00 mean an AAC stream in ADTS frames
        return "aac" if head[1] & 0x06 == 0 else "mp3"
    return None


_SIGNATURES = (
    (b"\x1a\x45\xdf\xa3", "matroska"),
    (b"FLV", "flv"),
    (b"OggS", "ogg"),
    (b"\x00\x00\x01\xba", "mpeg"),
    (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "asf"),
    (b"GIF8", "gif"),
    (b"fLaC", "flac"),
    (b"ID3", "mp3"),
    (b"#!AMR", "amr"),
    (b"caff", "caf"),
)
