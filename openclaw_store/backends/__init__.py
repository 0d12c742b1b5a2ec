"""One module tree for each database engine, behind the interfaces of `base`.

Drivers, connections and error mapping live here; no table and no rule about tasks does.
"""
