"""SQLAlchemy (psycopg, psycopg2, asyncpg, pg8000) and Django's ORM. Traps: everything in a transaction,
reflection over the catalogs, RETURNING, savepoints, read after write on one connection."""
import asyncio
import os

import django
from django.conf import settings
from sqlalchemy import create_engine, inspect, select, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

HOST, PORT = os.environ["PGHOST"], os.environ["PGPORT"]
USER, PASSWORD, DATABASE = os.environ["PGUSER"], os.environ["PGPASSWORD"], os.environ["PGDATABASE"]


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = "item"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


def url(driver):
    return f"postgresql+{driver}://{USER}:{PASSWORD}@{HOST}:{PORT}/{DATABASE}"


def use(session, driver):
    session.add_all([Item(name=f"{driver} {i}") for i in range(20)])
    session.commit()
    nested = session.begin_nested()
    session.add(Item(name="never"))
    session.flush()
    nested.rollback()
    return len(session.scalars(select(Item)).all()), session.scalar(text("SELECT max(name) FROM item"))


for driver in ("psycopg", "psycopg2", "pg8000"):
    engine = create_engine(url(driver))
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        print(driver, use(session, driver))
    print("reflected", [c["name"] for c in inspect(engine).get_columns("item")], inspect(engine).get_pk_constraint("item")["constrained_columns"])
    Base.metadata.drop_all(engine)
    engine.dispose()


async def asynchronous():
    engine = create_async_engine(url("asyncpg"))
    async with engine.begin() as con:
        await con.run_sync(Base.metadata.create_all)
        print("asyncpg", await con.run_sync(lambda c: use(Session(c), "asyncpg")))
        await con.run_sync(Base.metadata.drop_all)
    await engine.dispose()


asyncio.run(asynchronous())

settings.configure(
    INSTALLED_APPS=["django.contrib.contenttypes", "django.contrib.auth"],
    DATABASES={"default": {"ENGINE": "django.db.backends.postgresql", "NAME": DATABASE, "HOST": HOST, "PORT": PORT, "USER": USER, "PASSWORD": PASSWORD}},
)
django.setup()
from django.contrib.auth.models import Group, User  # noqa: E402
from django.core.management import call_command  # noqa: E402
from django.db import connection, transaction  # noqa: E402

call_command("migrate", verbosity=0)
group = Group.objects.create(name="readers")
for i in range(10):
    User.objects.create(username=f"user {i}").groups.add(group)
with transaction.atomic():
    locked = User.objects.select_for_update().get(username="user 3")
    locked.email = "three@example.org"
    locked.save()
print("django", User.objects.filter(groups__name="readers", email__endswith="org").count(), len(connection.introspection.table_names()))
print("chunks", sum(1 for _ in User.objects.order_by("pk").iterator(chunk_size=3)))
