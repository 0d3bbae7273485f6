"""What stands in `inside` runs in a guest, not here."""

collect_ignore = ["inside"]
