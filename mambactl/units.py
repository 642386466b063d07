"""Bytes and seconds as a person says them."""


def decimal_size(count: int) -> str:
    """Bytes in the unit that leaves few digits: kB are 1,000 of them."""
    power = min((len(str(count)) - 1) // 3, 3)
    return f"{count / 1000**power:,.4g} {('B', 'kB', 'MB', 'GB')[power]}"


def duration(seconds: float) -> str:
    """Seconds as a person says them: 4.2 s, 3 min 12 s, 5 h 20 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min {rest} s"
