"""Requests of a web application, each in a transaction of its own that begins by itself: SQLAlchemy's sessions (psycopg,
psycopg2) and Django's views with ATOMIC_REQUESTS. Most only read; each fifth reads, and then writes what follows from that.
Traps: autobegin, ROLLBACK of what has only read, read-modify-write, lazy loading, connections that are pooled."""
import os

import django
from django.conf import settings
from sqlalchemy import ForeignKey, create_engine, func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

HOST, PORT = os.environ["PGHOST"], os.environ["PGPORT"]
USER, PASSWORD, DATABASE = os.environ["PGUSER"], os.environ["PGPASSWORD"], os.environ["PGDATABASE"]
REQUESTS = 200


class Base(DeclarativeBase):
    pass


class Author(Base):
    __tablename__ = "web_author"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    books: Mapped[list["Book"]] = relationship(back_populates="author", order_by="Book.id")


class Book(Base):
    __tablename__ = "web_book"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    sold: Mapped[int] = mapped_column(default=0)
    author_id: Mapped[int] = mapped_column(ForeignKey("web_author.id"))
    author: Mapped[Author] = relationship(back_populates="books")


def request(session, number):
    author = session.get(Author, number % 10 + 1)
    seen = [author.name, [book.sold for book in author.books]]
    if number % 5 == 0:
        book = session.scalar(select(Book).where(Book.author_id == author.id).order_by(Book.sold, Book.id).limit(1))
        book.sold += 1
        session.commit()
        return seen + [book.sold]
    best = session.execute(select(Book.title, Book.sold).order_by(Book.sold.desc(), Book.id).limit(3)).all()
    total = session.scalar(select(func.sum(Book.sold)))
    return seen + [[tuple(row) for row in best], total]


for driver in ("psycopg", "psycopg2"):
    engine = create_engine(f"postgresql+{driver}://{USER}:{PASSWORD}@{HOST}:{PORT}/{DATABASE}")
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        session.add_all([Author(name=f"author {a}", books=[Book(title=f"book {a}.{b}") for b in range(3)]) for a in range(10)])
        session.commit()
    for number in range(REQUESTS):
        with Session(engine) as session:
            print(driver, number, request(session, number))
    Base.metadata.drop_all(engine)
    engine.dispose()

settings.configure(
    ALLOWED_HOSTS=["testserver"],
    ROOT_URLCONF=__name__,
    INSTALLED_APPS=["django.contrib.contenttypes", "django.contrib.auth"],
    DATABASES={"default": {"ENGINE": "django.db.backends.postgresql", "NAME": DATABASE, "HOST": HOST, "PORT": PORT, "USER": USER, "PASSWORD": PASSWORD, "ATOMIC_REQUESTS": True}},
)
django.setup()
from django.db import connection, models  # noqa: E402
from django.http import JsonResponse  # noqa: E402
from django.test import Client  # noqa: E402
from django.urls import path  # noqa: E402


class Page(models.Model):
    name = models.CharField(max_length=20, unique=True)
    hits = models.IntegerField(default=0)

    class Meta:
        app_label = "web"


def look(_, number):
    page = Page.objects.get(name=f"page {number % 10}")
    seen = [page.hits, Page.objects.filter(hits__gt=page.hits).count()]
    if number % 5 == 0:
        page.hits += 1
        page.save()
    else:
        seen.append(list(Page.objects.order_by("-hits", "name").values_list("name", flat=True)[:3]))
    return JsonResponse({"seen": seen})


urlpatterns = [path("<int:number>", look)]
with connection.schema_editor() as editor:
    editor.create_model(Page)
Page.objects.bulk_create([Page(name=f"page {n}") for n in range(10)])
for number in range(REQUESTS):
    print("django", number, Client().get(f"/{number}").json())
with connection.schema_editor() as editor:
    editor.delete_model(Page)
