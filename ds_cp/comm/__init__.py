"""Every byte on the wire. ``wire`` alone touches deepspeed.comm; the rest builds on its groups."""
