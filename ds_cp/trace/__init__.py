"""What a rank did when: recorded in steps, written as a trace that Perfetto and Chrome show, and
summed up. No torch here."""
