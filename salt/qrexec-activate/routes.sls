# In an app qube: the drop-ins of its routes, enabled as `systemctl --user enable` does it. Sockets that have changed
# are restarted, if the user is logged in; no connection is interrupted by that.
{% from 'qrexec-activate/map.jinja' import routes, user, home, unit, template_unit with context %}
{% set folder = home ~ '/.config/systemd/user' %}
{% set mine = [] %}
{% for name, route in routes | dictsort if route.client == grains['id'] %}
{% do mine.append((name, route)) %}
{% endfor %}
{% set kept = [] %}
{% for name, route in mine if not route.get('absent') %}
{% do kept.append(unit(route)) %}
{% endfor %}

{% for name, route in mine %}
{{ (folder ~ '/' ~ unit(route) ~ '.d/' ~ name ~ '.conf') | tojson }}:
{% if route.get('absent') %}
  file.absent: []
{% else %}
  file.managed:
    - user: {{ user }}
    - group: {{ user }}
    - dir_mode: '0755'
    - makedirs: true
    - contents:
      - '[Socket]'
{% for address in ([route.listen] if route.listen is string else route.listen) %}
      - {{ ('ListenStream=' ~ address) | tojson }}
{% endfor %}
      - {{ ('FileDescriptorName=' ~ route.target.replace(':', '\\x3a')) | tojson }}
{% endif %}
{% endfor %}

{% set seen = [] %}
{% for name, route in mine if unit(route) not in seen %}
{% do seen.append(unit(route)) %}
{{ (folder ~ '/sockets.target.wants/' ~ unit(route)) | tojson }}:
{% if unit(route) in kept %}
  file.symlink:
    - target: /usr/lib/systemd/user/{{ template_unit(route) }}
    - user: {{ user }}
    - group: {{ user }}
    - makedirs: true
{% else %}
  file.absent: []
{% endif %}

{{ (unit(route) ~ ' of the running session') | tojson }}:
  cmd.run:
    - name: {{ ("systemctl --user daemon-reload && systemctl --user "
        ~ ("restart" if unit(route) in kept else "stop") ~ " '" ~ unit(route) ~ "'") | tojson }}
    - runas: {{ user }}
    - env:
      - XDG_RUNTIME_DIR: /run/user/{{ salt['file.user_to_uid'](user) }}
    - onlyif: test -S /run/user/{{ salt['file.user_to_uid'](user) }}/systemd/private
    - onchanges:
{% for other, one in mine if unit(one) == unit(route) %}
      - file: {{ (folder ~ '/' ~ unit(one) ~ '.d/' ~ other ~ '.conf') | tojson }}
{% endfor %}
      - file: {{ (folder ~ '/sockets.target.wants/' ~ unit(route)) | tojson }}
{% endfor %}
