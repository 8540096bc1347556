# The routes of your qubes. /srv/formulas/base/qrexec-activate-formula/qrexec-activate/pillar.example shows how they look.
qrexec-activate:
  templates: {}
  routes: {}
