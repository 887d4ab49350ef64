"""From rows to packs: the pure core (conversation, template, contract, packing, sources) and its Ray Data graph."""
