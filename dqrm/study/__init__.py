"""Studies: one claim each, by real runs over several seeds, held against the strongest rival."""
