"""Networks for the runtimes that ship: SE spelled for each, exported, quantised, and looked at after its compiler."""
