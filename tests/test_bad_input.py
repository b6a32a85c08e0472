"""Bad input ends in one line that names the file or option, the value and the remedy, before anything is loaded or computed.

One table per area: what is typed -> what the message must say.
"""
