# qrexec-activate for a fleet of qubes: the packages in templates, the drop-ins in app qubes, the policy in dom0, all from
# one pillar of routes (pillar.example says how it looks).
#
# In dom0, with the package qubes-mgmt-salt-dom0-qrexec-activate, or with this folder in /srv/salt and the pillar in
# /srv/pillar:
#
#     qubesctl --skip-dom0 --targets=debian-13 state.apply qrexec-activate
#     qubesctl state.apply qrexec-activate
#     qubesctl --skip-dom0 --targets=work,nfs state.apply qrexec-activate
{% set type = salt['pillar.get']('qubes:type', 'app') %}

include:
{% if type == 'admin' %}
  - qrexec-activate.policy
{% elif type == 'template' %}
  - qrexec-activate.packages
{% elif type == 'standalone' %}
  - qrexec-activate.packages
  - qrexec-activate.routes
{% else %}
  - qrexec-activate.routes
{% endif %}

# For Salt it is an error to have nothing to do, as in a qube without a route.
qrexec-activate:
  test.nop: []
