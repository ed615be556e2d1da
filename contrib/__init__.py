"""What lives outside the packages until it has earned its place: it runs from a checkout and is in no wheel."""
