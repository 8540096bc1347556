# In an app qube: the drop-ins of its routes, enabled as `systemctl --user enable` does it. Sockets that have changed
# are restarted, if the user is logged in; no connection is interrupted by that.
#
# Everything is done as the user: what Salt did as root in that user's folders would go wherever the user's links lead.
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
{% set path = folder ~ '/' ~ unit(route) ~ '.d/' ~ name ~ '.conf' %}
{{ path | tojson }}:
  cmd.run:
    - runas: {{ user | tojson }}
    - cwd: /
{% if route.get('absent') %}
    - name: rm -- "$FILE"
    - onlyif: test -e "$FILE" || test -L "$FILE"
    - env:
      - FILE: {{ path | tojson }}
{% else %}
{% set lines = ['[Socket]'] %}
{% for address in ([route.listen] if route.listen is string else route.listen) %}
{% do lines.append('ListenStream=' ~ address) %}
{% endfor %}
{% do lines.append('FileDescriptorName=' ~ route.target.replace(':', '\\x3a')) %}
    - name: mkdir -p "${FILE%/*}" && printf '%s\n' "$TEXT" >"$FILE"
    - unless: printf '%s\n' "$TEXT" | cmp -s - "$FILE"
    - env:
      - FILE: {{ path | tojson }}
      - TEXT: {{ lines | join('\n') | tojson }}
{% endif %}
{% endfor %}

{% set seen = [] %}
{% for name, route in mine if unit(route) not in seen %}
{% do seen.append(unit(route)) %}
{% set link = folder ~ '/sockets.target.wants/' ~ unit(route) %}
{{ link | tojson }}:
  cmd.run:
    - runas: {{ user | tojson }}
    - cwd: /
{% if unit(route) in kept %}
    - name: mkdir -p "${LINK%/*}" && ln -sfn "$TARGET" "$LINK"
    - unless: test "$(readlink "$LINK")" = "$TARGET"
{% else %}
    - name: rm -- "$LINK"
    - onlyif: test -L "$LINK"
{% endif %}
    - env:
      - LINK: {{ link | tojson }}
      - TARGET: {{ ('/usr/lib/systemd/user/' ~ template_unit(route)) | tojson }}

{{ (unit(route) ~ ' of the running session') | tojson }}:
  cmd.run:
    - name: systemctl --user daemon-reload && systemctl --user "$ACTION" "$UNIT"
    - runas: {{ user | tojson }}
    - cwd: /
    - env:
      - ACTION: {{ 'restart' if unit(route) in kept else 'stop' }}
      - UNIT: {{ unit(route) | tojson }}
      - XDG_RUNTIME_DIR: /run/user/{{ salt['file.user_to_uid'](user) }}
    - onlyif: test -S /run/user/{{ salt['file.user_to_uid'](user) }}/systemd/private
    - onchanges:
{% for other, one in mine if unit(one) == unit(route) %}
      - cmd: {{ (folder ~ '/' ~ unit(one) ~ '.d/' ~ other ~ '.conf') | tojson }}
{% endfor %}
      - cmd: {{ link | tojson }}
{% endfor %}
