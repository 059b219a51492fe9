"""Which addresses media may be fetched from: public unicast ones, and nothing that leads into the server's network."""

from __future__ import annotations

import ipaddress

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# Beside what the standard library calls private or reserved in every Python version we run on.
_REFUSED_V4 = tuple(
    ipaddress.IPv4Network(text)
    for text in (
        "0.0.0.0/8",
        "100.64.0.0/10",  # carrier-grade NAT; holds Alibaba's metadata address
        "168.63.129.16/32",  # Azure's host agent, reachable from every machine there
        "192.0.0.0/24",  # protocol assignments; holds Oracle's metadata address
        "192.88.99.0/24",  # 6to4 relays
        "198.18.0.0/15",  # benchmarks of network devices
    )
)
_UNICAST_V6 = ipaddress.IPv6Network("2000::/3")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_V4_COMPATIBLE = ipaddress.IPv6Network("::/96")
_ISATAP = (0x0000_5EFE, 0x0200_5EFE)


def refusal(address: Address) -> str | None:
    """Why media may not come from ``address`` ("private", "loopback" ...), or None where it may."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id:
            return "link-local"
        if (inner := _embedded(address)) is not None:
            return refusal(inner)
    for kind in ("unspecified", "loopback", "link_local", "multicast"):
        if getattr(address, f"is_{kind}"):
            return kind.replace("_", "-")
    if isinstance(address, ipaddress.IPv4Address):
        if any(address in network for network in _REFUSED_V4):
            return "reserved"
    elif address not in _UNICAST_V6:
        return "private" if address.is_private or address.is_site_local else "reserved"
    if address.is_reserved:
        return "reserved"
    return None if address.is_global else "private"


def _embedded(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that a packet to this IPv6 address may end up at."""
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address.sixtofour is not None:
        return address.sixtofour
    if address.teredo is not None:
        return address.teredo[1]
    value = int(address)
    last = ipaddress.IPv4Address(value & 0xFFFF_FFFF)
    if address in _NAT64 or (value >> 32) & 0xFFFF_FFFF in _ISATAP:
        return last
    # :: and ::1 keep their own names
    return last if address in _V4_COMPATIBLE and value > 1 else None
