"""Django's ORM, as an application uses it. Traps: a read right after a write (autocommit, and after
ATOMIC), get_or_create, select_for_update with skip_locked, savepoints, server-side cursors, raw SQL,
on_commit, persistent connections in threads, a time zone per connection, sequences reset, migrations."""
import os
import threading

import django
from django.conf import settings

settings.configure(
    INSTALLED_APPS=["django.contrib.contenttypes", "django.contrib.auth", "django.contrib.sessions"],
    DATABASES={"default": {
        "ENGINE": "django.db.backends.postgresql", "NAME": os.environ["PGDATABASE"], "HOST": os.environ["PGHOST"],
        "PORT": os.environ["PGPORT"], "USER": os.environ["PGUSER"], "PASSWORD": os.environ["PGPASSWORD"],
        "CONN_MAX_AGE": None, "TIME_ZONE": "Asia/Tokyo",
    }},
    USE_TZ=True,
    PASSWORD_HASHERS=["django.contrib.auth.hashers.MD5PasswordHasher"],
    SECRET_KEY="drivers",
)
django.setup()
from django.contrib.auth.models import Group, Permission, User  # noqa: E402
from django.contrib.sessions.backends.db import SessionStore  # noqa: E402
from django.core.management import call_command  # noqa: E402
from django.db import IntegrityError, connection, models, transaction  # noqa: E402

call_command("migrate", verbosity=0)
print("migrated", Permission.objects.count(), len(connection.introspection.table_names()))

stale = 0
for i in range(100):
    user = User.objects.create_user(f"user {i}", f"{i}@example.org", "secret")
    stale += not User.objects.filter(pk=user.pk).exists()
    user.first_name = f"First {i}"
    user.save()
    stale += User.objects.get(pk=user.pk).first_name != f"First {i}"
    if i % 10 == 0:
        user.delete()
        stale += User.objects.filter(username=f"user {i}").exists()
print("stale", stale, User.objects.count())

group, made = Group.objects.get_or_create(name="readers")
again, made_again = Group.objects.get_or_create(name="readers")
print("get or create", made, made_again, group == again)
group.user_set.set(User.objects.filter(username__endswith="1"))
print("prefetched", [len(g.user_set.all()) for g in Group.objects.prefetch_related("user_set")])
updated, created = User.objects.update_or_create(username="user 1", defaults={"last_name": "Updated"})
print("updated", updated.last_name, created, User.objects.get(username="user 1").last_name)
print("bulk", len(User.objects.bulk_create([User(username=f"bulk {i}") for i in range(500)])),
      User.objects.filter(username__startswith="bulk").update(is_staff=True))

done = []
with transaction.atomic():
    transaction.on_commit(lambda: done.append(User.objects.filter(username="inside").exists()))
    User.objects.create(username="inside")
    try:
        with transaction.atomic():
            User.objects.create(username="inside")
    except IntegrityError:
        print("savepoint", User.objects.filter(username="inside").count())
print("on commit", done)
try:
    with transaction.atomic():
        User.objects.all().delete()
        raise RuntimeError
except RuntimeError:
    print("rolled back", User.objects.count())

failed = []


def counts_up(number):
    try:
        for _ in range(20):
            with transaction.atomic():
                counter = User.objects.select_for_update().get(username="inside")
                counter.last_name = str(int(counter.last_name or 0) + 1)
                counter.save(update_fields=["last_name"])
            assert int(User.objects.get(username="inside").last_name) > 0
    except BaseException as error:
        failed.append(repr(error))
    finally:
        connection.close()


threads = [threading.Thread(target=counts_up, args=(number,)) for number in range(5)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print("no update lost", failed, User.objects.get(username="inside").last_name)

taken = []


def takes_work(number):
    while True:
        with transaction.atomic():
            job = User.objects.select_for_update(skip_locked=True).filter(username__startswith="bulk", is_active=True).first()
            if job is None:
                break
            job.is_active = False
            job.save()
            taken.append(job.pk)
        if len(taken) >= 120:
            break
    connection.close()


threads = [threading.Thread(target=takes_work, args=(number,)) for number in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print("each job once", len(taken) == len(set(taken)), len(taken) >= 120)

store = SessionStore()
store["cart"] = [1, 2, 3]
store.create()
print("web session", SessionStore(store.session_key)["cart"])
print("chunks", sum(1 for _ in User.objects.order_by("pk").iterator(chunk_size=50)))
print("aggregate", User.objects.aggregate(models.Count("pk"), staff=models.Count("pk", filter=models.Q(is_staff=True))))
with connection.cursor() as cursor:
    cursor.execute("SHOW TimeZone")
    print("time zone", cursor.fetchone())
    cursor.execute("SELECT setval(pg_get_serial_sequence('auth_user', 'id'), 100000)")
print("after setval", User.objects.create(username="after").pk)
print("explained", "Scan" in User.objects.filter(username="after").explain(analyze=True))
call_command("flush", verbosity=0, interactive=False, reset_sequences=True)
print("flushed", User.objects.count(), User.objects.create(username="first").pk)
call_command("migrate", "auth", "zero", verbosity=0)
print("unmigrated", "auth_user" in connection.introspection.table_names())
